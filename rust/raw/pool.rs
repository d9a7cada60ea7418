//! Dead objects, kept for the next ones of their type: faster than to free and allocate them.

use std::ptr::NonNull;

#[cfg(Py_GIL_DISABLED)]
pub use no_pool::Pool;
#[cfg(not(Py_GIL_DISABLED))]
pub use under_the_gil::Pool;

/// Threads would contend for it, and the allocator keeps memory for each of them.
#[cfg(Py_GIL_DISABLED)]
mod no_pool {
    use std::marker::PhantomData;

    use super::NonNull;

    pub struct Pool<T>(PhantomData<fn(T)>);

    impl<T> Pool<T> {
        pub const fn new() -> Self {
            Self(PhantomData)
        }

        pub unsafe fn take(&self) -> Option<NonNull<T>> {
            None
        }

        pub unsafe fn put(&self, _: NonNull<T>) -> bool {
            false
        }
    }
}

#[cfg(not(Py_GIL_DISABLED))]
mod under_the_gil {
    use std::cell::UnsafeCell;

    use pyo3::ffi;

    use super::NonNull;

    /// One is taken and given back; more are dead at once only after many were alive at once.
    const SIZE: usize = 16;

    /// Of `T`s, which are Python objects: they begin with a `PyObject`.
    pub struct Pool<T>(UnsafeCell<([Option<NonNull<T>>; SIZE], usize)>);

    // SAFETY: only used with the GIL held, and nothing happens meanwhile that could release it.
    unsafe impl<T> Sync for Pool<T> {}

    impl<T> Pool<T> {
        pub const fn new() -> Self {
            Self(UnsafeCell::new(([None; SIZE], 0)))
        }

        /// A dead object to bring back to life, untracked, as it was given away.
        ///
        /// # Safety
        /// The GIL is held.
        #[inline(always)]
        pub unsafe fn take(&self) -> Option<NonNull<T>> {
            // SAFETY: as above.  What is in the pool is a dead object that is nobody else's, and still
            // holds the reference to its type.
            unsafe {
                let (objects, len) = &mut *self.0.get();
                *len = len.checked_sub(1)?;
                let object = (*objects.get(*len)?)?;
                (*object.as_ptr().cast::<ffi::PyObject>()).ob_refcnt = ffi::PyObject_HEAD_INIT.ob_refcnt;
                Some(object)
            }
        }

        /// Keep a dead object, if there is room.
        ///
        /// # Safety
        /// The GIL is held, and nobody else has the object.
        #[inline(always)]
        pub unsafe fn put(&self, object: NonNull<T>) -> bool {
            // SAFETY: as above.
            let (objects, len) = unsafe { &mut *self.0.get() };
            match objects.get_mut(*len) {
                Some(place) => {
                    *place = Some(object);
                    *len += 1;
                    true
                }
                None => false,
            }
        }
    }
}
