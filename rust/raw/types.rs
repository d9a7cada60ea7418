//! The parts of which a type is made.

use std::ffi::{CStr, c_int, c_ulong, c_void};
use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;

/// Create a type whose objects the garbage collector may track.
///
/// # Safety
/// The objects are `size` bytes.  Each slot has the function or table that its id requires, for objects of this type.
pub unsafe fn new_type<'py>(
    py: Python<'py>,
    name: &'static CStr,
    size: usize,
    flags: c_ulong,
    slots: &[ffi::PyType_Slot],
) -> PyResult<Bound<'py, PyAny>> {
    let mut slots = [slots, &[slot::<c_void>(0, ptr::null())]].concat();
    let mut spec = ffi::PyType_Spec {
        name: name.as_ptr(),
        basicsize: size as _,
        itemsize: 0,
        flags: (ffi::Py_TPFLAGS_DEFAULT | ffi::Py_TPFLAGS_HAVE_GC | flags) as _,
        slots: slots.as_mut_ptr(),
    };
    // SAFETY: the name is static, the slots end with a zeroed one, and the caller promises that they are right.
    unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyType_FromSpec(&mut spec)) }
}

pub const fn slot<T>(id: c_int, value: *const T) -> ffi::PyType_Slot {
    ffi::PyType_Slot { slot: id, pfunc: value.cast_mut().cast() }
}

/// A table of methods, getters or members.  It lives as long as its type: for ever.
pub fn table<T>(entries: Vec<T>) -> *const T {
    entries.leak().as_ptr()
}

pub const fn method(
    name: &'static CStr,
    function: ffi::PyMethodDefPointer,
    flags: c_int,
    doc: Option<&'static CStr>,
) -> ffi::PyMethodDef {
    let doc = match doc {
        Some(doc) => doc.as_ptr(),
        None => ptr::null(),
    };
    ffi::PyMethodDef { ml_name: name.as_ptr(), ml_meth: function, ml_flags: flags, ml_doc: doc }
}

/// The end of a table of methods.
pub const NO_METHOD: ffi::PyMethodDef = ffi::PyMethodDef::zeroed();

/// A getter that gets `closure`.
pub const fn getter(name: &'static CStr, get: ffi::getter, closure: *mut c_void) -> ffi::PyGetSetDef {
    ffi::PyGetSetDef { name: name.as_ptr(), get: Some(get), closure, ..NO_GETTER }
}

/// The end of a table of getters.
pub const NO_GETTER: ffi::PyGetSetDef =
    ffi::PyGetSetDef { name: ptr::null(), get: None, set: None, doc: ptr::null(), closure: ptr::null_mut() };

/// A member that says where in the object a field of the interpreter is.
pub const fn offset(name: &'static CStr, offset: usize) -> ffi::PyMemberDef {
    ffi::PyMemberDef {
        name: name.as_ptr(),
        type_code: ffi::Py_T_PYSSIZET,
        offset: offset as _,
        flags: ffi::Py_READONLY,
        doc: ptr::null(),
    }
}

/// The end of a table of members.
pub const NO_MEMBER: ffi::PyMemberDef = ffi::PyMemberDef { name: ptr::null(), ..offset(c"", 0) };
