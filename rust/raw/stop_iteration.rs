//! The StopIteration that carries a result out of `tp_iternext`.

use pyo3::exceptions::PyStopIteration;
use pyo3::prelude::*;

#[cfg(not(all(Py_3_12, not(Py_GIL_DISABLED))))]
pub use always_new::Spare;
#[cfg(all(Py_3_12, not(Py_GIL_DISABLED)))]
pub use reused::Spare;

/// The StopIteration for this value.
pub fn stop_iteration(value: Bound<'_, PyAny>) -> PyErr {
    // In a tuple: a value that is a tuple or an exception would be taken for something else.
    PyStopIteration::new_err((value.unbind(),))
}

/// 3.11 awaits through `am_send`, without an exception; threads without a GIL would get in each other's way.
#[cfg(not(all(Py_3_12, not(Py_GIL_DISABLED))))]
mod always_new {
    use pyo3::prelude::*;

    pub struct Spare;

    impl Spare {
        pub const fn new() -> Self {
            Self
        }

        pub fn raise(&mut self, value: Bound<'_, PyAny>) {
            let py = value.py();
            super::stop_iteration(value).restore(py);
        }

        pub fn recycle(&mut self) {}

        pub fn discard(&mut self) {}
    }
}

/// 3.12 and later await through `tp_iternext`, hence a StopIteration, and making one takes longer than all the rest.
#[cfg(all(Py_3_12, not(Py_GIL_DISABLED)))]
mod reused {
    use std::ptr;

    use pyo3::exceptions::PyStopIteration;
    use pyo3::ffi;
    use pyo3::prelude::*;

    /// A StopIteration to be used again, while nobody else has seen it, or none yet.
    ///
    /// The `await` of the interpreter takes the value and drops the exception.  Anyone else may keep
    /// it, or leave traces on it: a debugger, `next()` called by hand.  It is then theirs.
    pub struct Spare(*mut ffi::PyStopIterationObject);

    impl Spare {
        pub const fn new() -> Self {
            Self(ptr::null_mut())
        }

        #[inline(always)]
        pub fn raise(&mut self, value: Bound<'_, PyAny>) {
            if !self.is_pristine() {
                return self.raise_new(value);
            }
            // SAFETY: the exception is this one's alone; its value, None while it is idle, is owned by it.
            unsafe {
                let idle = ptr::replace(&raw mut (*self.0).value, value.into_ptr());
                ffi::PyErr_SetRaisedException(ffi::Py_NewRef(self.0.cast()));
                ffi::Py_DECREF(idle);
            }
        }

        #[cold]
        fn raise_new(&mut self, value: Bound<'_, PyAny>) {
            self.discard();
            let py = value.py();
            match py.get_type::<PyStopIteration>().call0() {
                Ok(exception) => {
                    self.0 = exception.into_ptr().cast();
                    // SAFETY: as above.
                    unsafe {
                        let idle = ptr::replace(&raw mut (*self.0).value, value.into_ptr());
                        ffi::PyErr_SetRaisedException(ffi::Py_NewRef(self.0.cast()));
                        ffi::Py_XDECREF(idle);
                    }
                }
                Err(error) => error.restore(py),
            }
        }

        /// Let go of the value, and of the exception if someone has seen it.
        #[inline(always)]
        pub fn recycle(&mut self) {
            if self.is_pristine() {
                // SAFETY: the exception is this one's alone; its value is owned by it.
                unsafe {
                    let value = ptr::replace(&raw mut (*self.0).value, ffi::Py_NewRef(ffi::Py_None()));
                    ffi::Py_DECREF(value);
                }
            } else {
                self.discard();
            }
        }

        pub fn discard(&mut self) {
            // SAFETY: null or owned.
            unsafe { ffi::Py_XDECREF(std::mem::replace(&mut self.0, ptr::null_mut()).cast()) }
        }

        #[inline(always)]
        fn is_pristine(&self) -> bool {
            let exception = self.0;
            // SAFETY: null or a StopIteration, whose fields are null or objects.  The flag is read as
            // the byte it is in C.
            unsafe {
                !exception.is_null()
                    && ffi::Py_REFCNT(exception.cast()) == 1
                    && ffi::PyTuple_GET_SIZE((*exception).args) == 0
                    && (*exception).traceback.is_null()
                    && (*exception).context.is_null()
                    && (*exception).cause.is_null()
                    && (*exception).dict.is_null()
                    && (*exception).notes.is_null()
                    && (&raw const (*exception).suppress_context).cast::<u8>().read() == 0
            }
        }
    }
}
