//! Objects that all threads use, so that without the GIL the threads would contend for their reference counts.

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, Ordering};

use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;

use super::outcome::Raised;

/// With the GIL, the GIL orders the store before every load.
const LOAD: Ordering = if cfg!(Py_GIL_DISABLED) { Ordering::Acquire } else { Ordering::Relaxed };

/// A static variable for a Python object that lives as long as the process.  Reading the variable costs one load.
///
/// The variable is empty until the module is imported.
pub struct Immortal<T = ffi::PyObject>(AtomicPtr<T>);

impl<T> Immortal<T> {
    pub const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    /// The object, or null if the variable is empty.  The pointer is for comparisons.
    #[inline(always)]
    pub fn as_ptr(&self) -> *const T {
        self.0.load(LOAD)
    }

    /// The object.  It is an error if the variable is empty.
    #[inline(always)]
    pub fn get(&self) -> Result<NonNull<T>, Raised> {
        NonNull::new(self.0.load(LOAD)).ok_or_else(not_initialized)
    }

    /// Set the variable, and keep the object alive for ever.
    ///
    /// # Safety
    /// The object is a `T`.  This thread has created the object, and no other thread uses it yet.
    pub unsafe fn set(&self, object: Bound<'_, PyAny>) {
        // SAFETY: the caller promises the same.
        unsafe { immortalize(&object) };
        self.0.store(object.into_ptr().cast(), Ordering::Release);
    }
}

#[cold]
fn not_initialized() -> Raised {
    PyRuntimeError::new_err("ctxalchemy._native is not initialized").into()
}

/// Exclude an object that lives as long as the process from reference counting, for which threads would contend.
///
/// # Safety
/// This thread has created the object, and no other thread uses it yet.
unsafe fn immortalize(object: &Bound<'_, PyAny>) {
    #[cfg(Py_GIL_DISABLED)]
    // SAFETY: no other thread reads or writes these fields, as the caller promises.
    unsafe {
        let header = object.as_ptr();
        let immortal = ffi::PyObject_HEAD_INIT;
        (*header).ob_tid = immortal.ob_tid;
        (*header).ob_ref_local.store(immortal.ob_ref_local.into_inner(), Ordering::Relaxed);
        (*header).ob_ref_shared.store(immortal.ob_ref_shared.into_inner(), Ordering::Relaxed);
    }
    #[cfg(not(Py_GIL_DISABLED))]
    let _ = object;
}

/// Let the interpreter use an object that the garbage collector tracks without counting references, as it does with
/// functions written in Python.
///
/// # Safety
/// This thread has created the object, and no other thread uses it yet.
pub unsafe fn share(object: &Bound<'_, PyAny>) {
    #[cfg(all(Py_GIL_DISABLED, Py_3_14))]
    // SAFETY: the function is in the C API from 3.14 on, with this signature, and takes any object.
    unsafe {
        unsafe extern "C" {
            fn PyUnstable_Object_EnableDeferredRefcount(object: *mut ffi::PyObject) -> std::ffi::c_int;
        }
        PyUnstable_Object_EnableDeferredRefcount(object.as_ptr());
    }
    #[cfg(not(all(Py_GIL_DISABLED, Py_3_14)))]
    // SAFETY: the caller promises the same.
    unsafe {
        immortalize(object);
    }
}
