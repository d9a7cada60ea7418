fn main() {
    // Set `Py_3_12`, `Py_GIL_DISABLED` and the other cfgs of PyO3 for this crate too.
    pyo3_build_config::use_pyo3_cfgs();
    pyo3_build_config::add_extension_module_link_args();
}
