//! A value in a Python object, with a lock that costs nothing under the GIL.

use std::cell::UnsafeCell;

use pyo3::prelude::*;
use pyo3::sync::critical_section::with_critical_section;

/// A value that is a part of a Python object, and is accessed only while the object is locked.
///
/// The lock is the GIL, or without the GIL the critical section of the object.  If Python code runs in the locking
/// thread, this code may access the value, and may make the interpreter suspend the lock.  Therefore no Python code may
/// run during an access.
pub struct Locked<T>(UnsafeCell<T>);

impl<T> Locked<T> {
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// Call `body` with exclusive access to the value.
    ///
    /// # Safety
    /// The value is a part of `object`.  `body` runs no Python code: it neither creates Python objects nor drops
    /// references to any.  It moves references out of the value instead, and the caller drops them afterwards.
    #[inline(always)]
    pub unsafe fn with<R>(&self, object: &Bound<'_, PyAny>, body: impl FnOnce(&mut T) -> R) -> R {
        with_critical_section(object, || {
            // SAFETY: this thread is attached, and without the GIL it has locked the object.  `body` runs no Python
            // code, and so this thread neither comes here again nor suspends the lock before `body` returns.
            body(unsafe { &mut *self.0.get() })
        })
    }

    /// The value, without a lock: for `tp_traverse`.
    ///
    /// # Safety
    /// Nothing changes the value while the reference is used.
    pub unsafe fn peek(&self) -> &T {
        // SAFETY: there is no exclusive reference to the value, as the caller promises.
        unsafe { &*self.0.get() }
    }

    /// The value, for the only owner.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }

    pub fn into_inner(self) -> T {
        self.0.into_inner()
    }
}
