fn main() {
    // Py_3_12, Py_GIL_DISABLED and their like, for this crate's own use.
    pyo3_build_config::use_pyo3_cfgs();
    pyo3_build_config::add_extension_module_link_args();
}
