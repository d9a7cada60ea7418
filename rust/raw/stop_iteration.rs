//! The StopIteration with which `tp_iternext` returns a result.

use pyo3::exceptions::PyStopIteration;
use pyo3::prelude::*;

#[cfg(not(Py_3_12))]
pub use always_new::ReusableStopIteration;
#[cfg(Py_3_12)]
pub use reused::ReusableStopIteration;

/// A new StopIteration with this value.
pub fn stop_iteration(value: Bound<'_, PyAny>) -> PyErr {
    // Not with `new_err`, which holds the value in a `Py`: PyO3 does not detect that the interpreter has attached the
    // thread, and defers the drop of a `Py`.  The session would stay alive.
    value.py().get_type::<PyStopIteration>().call1((value,)).map_or_else(|error| error, PyErr::from_value)
}

/// CPython 3.11 awaits through `am_send`, which needs no exception.
#[cfg(not(Py_3_12))]
mod always_new {
    use pyo3::prelude::*;

    pub struct ReusableStopIteration;

    impl ReusableStopIteration {
        pub const fn new() -> Self {
            Self
        }

        pub fn raise(&self, value: Bound<'_, PyAny>) {
            let py = value.py();
            super::stop_iteration(value).restore(py);
        }

        pub fn recycle(&self, _: Python<'_>) {}

        pub fn discard(&self, _: Python<'_>) {}
    }
}

/// CPython 3.12 and later await through `tp_iternext`.  Creating its StopIteration takes longer than the rest of an
/// await.
#[cfg(Py_3_12)]
mod reused {
    use std::cell::Cell;
    use std::ptr;

    use pyo3::exceptions::PyStopIteration;
    use pyo3::ffi;
    use pyo3::prelude::*;
    use pyo3::types::PyNone;

    #[cfg(Py_GIL_DISABLED)]
    use crate::raw::thread;

    /// A StopIteration that is raised again as long as no other code has used it.  There is none at first.
    ///
    /// The interpreter's `await` takes the value and drops the exception.  Other code, such as a debugger or a call of
    /// `next()`, may keep the exception or change it.  Such an exception is not raised again.
    pub struct ReusableStopIteration {
        /// Null, or an owned reference.
        exception: Cell<*mut ffi::PyStopIterationObject>,
        #[cfg(Py_GIL_DISABLED)]
        creator: Cell<usize>,
    }

    impl ReusableStopIteration {
        pub const fn new() -> Self {
            Self {
                exception: Cell::new(ptr::null_mut()),
                #[cfg(Py_GIL_DISABLED)]
                creator: Cell::new(0),
            }
        }

        /// Raise a StopIteration with this value.
        #[inline(always)]
        pub fn raise(&self, value: Bound<'_, PyAny>) {
            match self.pristine() {
                // SAFETY: the exception is alive, and no other code uses it.
                Some(exception) => unsafe { raise(exception, value) },
                None => self.raise_new(value),
            }
        }

        #[cold]
        fn raise_new(&self, value: Bound<'_, PyAny>) {
            let py = value.py();
            // Without arguments: setting a tuple at each await would take a tenth of the time of an await.
            match py.get_type::<PyStopIteration>().call0() {
                Ok(exception) => {
                    self.discard(py);
                    let exception = exception.into_ptr().cast();
                    self.exception.set(exception);
                    #[cfg(Py_GIL_DISABLED)]
                    self.creator.set(thread::number());
                    // SAFETY: the exception is new.
                    unsafe { raise(exception, value) }
                }
                Err(error) => error.restore(py),
            }
        }

        /// Drop the value, and keep the exception if no other code has used it.
        #[inline(always)]
        pub fn recycle(&self, py: Python<'_>) {
            match self.pristine() {
                // SAFETY: the exception is alive, and no other code uses it.
                Some(exception) => unsafe { set_value(exception, PyNone::get(py).to_owned().into_any()) },
                None => self.discard(py),
            }
        }

        /// Drop the exception.
        pub fn discard(&self, _: Python<'_>) {
            // SAFETY: the pointer is null or an owned reference, and the thread is attached.
            unsafe { ffi::Py_XDECREF(self.exception.replace(ptr::null_mut()).cast()) }
        }

        /// The exception, if there is one and no other code has used it.
        #[inline(always)]
        fn pristine(&self) -> Option<*mut ffi::PyStopIterationObject> {
            // Without the GIL, only the thread that created the exception can detect that there is no other reference.
            #[cfg(Py_GIL_DISABLED)]
            if self.creator.get() != thread::number() {
                return None;
            }
            let exception = self.exception.get();
            // SAFETY: the pointer is null or to a StopIteration, whose fields are null or objects.  The flag is read as
            // a byte, which it is in C.
            let is_pristine = unsafe {
                !exception.is_null()
                    && ffi::Py_REFCNT(exception.cast()) == 1
                    && ffi::PyTuple_GET_SIZE((*exception).args) == 0
                    && (*exception).traceback.is_null()
                    && (*exception).context.is_null()
                    && (*exception).cause.is_null()
                    && (*exception).dict.is_null()
                    && (*exception).notes.is_null()
                    && (&raw const (*exception).suppress_context).cast::<u8>().read() == 0
            };
            is_pristine.then_some(exception)
        }
    }

    /// # Safety
    /// `exception` is a StopIteration that no other code uses.
    #[inline(always)]
    unsafe fn raise(exception: *mut ffi::PyStopIterationObject, value: Bound<'_, PyAny>) {
        // SAFETY: the caller promises that the exception is alive.  The new reference keeps the exception alive while
        // the old value is dropped, and `PyErr_SetRaisedException` takes over the reference.
        unsafe {
            let raised = ffi::Py_NewRef(exception.cast());
            set_value(exception, value);
            ffi::PyErr_SetRaisedException(raised);
        }
    }

    /// # Safety
    /// `exception` is a StopIteration that no other code uses.
    #[inline(always)]
    unsafe fn set_value(exception: *mut ffi::PyStopIterationObject, value: Bound<'_, PyAny>) {
        // SAFETY: the exception owns its value, which is null or an object.
        unsafe {
            let old = ptr::replace(&raw mut (*exception).value, value.into_ptr());
            ffi::Py_XDECREF(old);
        }
    }
}
