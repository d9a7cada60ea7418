//! The StopIteration that carries a result out of `tp_iternext`.

use pyo3::exceptions::PyStopIteration;
use pyo3::prelude::*;

#[cfg(not(Py_3_12))]
pub use always_new::Spare;
#[cfg(Py_3_12)]
pub use reused::Spare;

/// The StopIteration for this value.
pub fn stop_iteration(value: Bound<'_, PyAny>) -> PyErr {
    // In a tuple: a value that is a tuple or an exception would be taken for something else.
    PyStopIteration::new_err((value.unbind(),))
}

/// 3.11 awaits through `am_send`, without an exception.
#[cfg(not(Py_3_12))]
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

/// 3.12 and later await through `tp_iternext`: making its StopIteration takes longer than all the rest.
#[cfg(Py_3_12)]
mod reused {
    use std::ptr;

    use pyo3::exceptions::PyStopIteration;
    use pyo3::ffi;
    use pyo3::prelude::*;

    #[cfg(Py_GIL_DISABLED)]
    use crate::raw::thread;

    /// A StopIteration to be used again, while nobody else has seen it, or none yet.
    ///
    /// The `await` of the interpreter takes the value and drops the exception.  Anyone else may keep
    /// it, or leave traces on it: a debugger, `next()` called by hand.  It is then theirs.
    pub struct Spare {
        exception: *mut ffi::PyStopIterationObject,
        #[cfg(Py_GIL_DISABLED)]
        maker: usize,
    }

    impl Spare {
        pub const fn new() -> Self {
            Self {
                exception: ptr::null_mut(),
                #[cfg(Py_GIL_DISABLED)]
                maker: 0,
            }
        }

        #[inline(always)]
        pub fn raise(&mut self, value: Bound<'_, PyAny>) {
            if self.is_pristine() {
                self.raise_again(value);
            } else {
                self.raise_new(value);
            }
        }

        #[cold]
        fn raise_new(&mut self, value: Bound<'_, PyAny>) {
            self.discard();
            // Without arguments: filling in a tuple each time would take a tenth of the await.
            match value.py().get_type::<PyStopIteration>().call0() {
                Ok(exception) => {
                    self.exception = exception.into_ptr().cast();
                    #[cfg(Py_GIL_DISABLED)]
                    {
                        self.maker = thread::number();
                    }
                    self.raise_again(value);
                }
                Err(error) => error.restore(value.py()),
            }
        }

        #[inline(always)]
        fn raise_again(&mut self, value: Bound<'_, PyAny>) {
            self.exchange(value.into_ptr());
            // SAFETY: an exception, and a reference to it that is given away.
            unsafe { ffi::PyErr_SetRaisedException(ffi::Py_NewRef(self.exception.cast())) }
        }

        /// Let go of the value, and of the exception if someone has seen it.
        #[inline(always)]
        pub fn recycle(&mut self) {
            if self.is_pristine() {
                // SAFETY: None is an object.
                self.exchange(unsafe { ffi::Py_NewRef(ffi::Py_None()) });
            } else {
                self.discard();
            }
        }

        #[inline(always)]
        fn exchange(&mut self, value: *mut ffi::PyObject) {
            // SAFETY: the exception is this one's alone; it owns its value.
            unsafe {
                let old = ptr::replace(&raw mut (*self.exception).value, value);
                ffi::Py_XDECREF(old);
            }
        }

        pub fn discard(&mut self) {
            // SAFETY: null or owned.
            unsafe { ffi::Py_XDECREF(std::mem::replace(&mut self.exception, ptr::null_mut()).cast()) }
        }

        #[inline(always)]
        fn is_pristine(&self) -> bool {
            let exception = self.exception;
            // Only the thread that made it can tell that there is no other reference.
            #[cfg(Py_GIL_DISABLED)]
            if self.maker != thread::number() {
                return false;
            }
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
