//! Dead objects, kept for the next ones of their type: faster than to free and allocate them.

#[cfg(not(Py_GIL_DISABLED))]
pub use under_the_gil::Pool;
#[cfg(Py_GIL_DISABLED)]
pub use without_the_gil::Pool;

#[cfg(not(Py_GIL_DISABLED))]
mod under_the_gil {
    use std::cell::UnsafeCell;
    use std::ptr::NonNull;

    use pyo3::ffi;

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

        /// A dead object brought back to life, untracked, as it was given away.
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

#[cfg(Py_GIL_DISABLED)]
mod without_the_gil {
    use std::ptr::{self, NonNull};
    use std::sync::atomic::{AtomicPtr, Ordering};

    use pyo3::ffi;

    use crate::raw::thread;

    const PLACES: usize = 128;

    /// Of `T`s, which are Python objects: they begin with a `PyObject`.
    ///
    /// A place for each thread, as a rule: threads that fall on the same one find it empty at times.
    pub struct Pool<T>([Place<T>; PLACES]);

    /// Not in one cache line with another, nor in one that is fetched along with it: threads would wait for each
    /// other's writes.
    #[repr(align(128))]
    struct Place<T>(AtomicPtr<T>);

    impl<T> Pool<T> {
        pub const fn new() -> Self {
            Self([const { Place(AtomicPtr::new(ptr::null_mut())) }; PLACES])
        }

        fn place(&self) -> &AtomicPtr<T> {
            &self.0[thread::number() % PLACES].0
        }

        /// A dead object brought back to life, untracked, as it was given away.
        ///
        /// # Safety
        /// The thread is attached.
        #[inline(always)]
        pub unsafe fn take(&self) -> Option<NonNull<T>> {
            let object = NonNull::new(self.place().swap(ptr::null_mut(), Ordering::Acquire))?;
            // SAFETY: as above.  It was in the pool, hence is nobody else's.
            unsafe {
                let header = object.as_ptr().cast::<ffi::PyObject>();
                let class = ffi::Py_TYPE(header);
                // Takes another reference to the type.
                ffi::PyObject_Init(header, class);
                ffi::Py_DECREF(class.cast());
            }
            Some(object)
        }

        /// Keep a dead object, if there is room.
        ///
        /// # Safety
        /// The thread is attached, and nobody else has the object.
        #[inline(always)]
        pub unsafe fn put(&self, object: NonNull<T>) -> bool {
            let kept =
                self.place().compare_exchange(ptr::null_mut(), object.as_ptr(), Ordering::Release, Ordering::Relaxed);
            kept.is_ok()
        }
    }
}
