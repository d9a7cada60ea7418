//! Free lists: dead objects whose memory the next objects of the same type use.
//!
//! Taking an object from the list is faster than freeing one and allocating one.

#[cfg(not(Py_GIL_DISABLED))]
pub use with_gil::FreeList;
#[cfg(Py_GIL_DISABLED)]
pub use without_gil::FreeList;

#[cfg(not(Py_GIL_DISABLED))]
mod with_gil {
    use std::cell::Cell;
    use std::ptr::NonNull;

    use pyo3::ffi;
    use pyo3::prelude::*;

    /// Usually one object is taken and put back.  More objects are dead at once only after as many were alive at once.
    const SIZE: usize = 16;

    /// Dead objects of the type `T`.
    pub struct FreeList<T> {
        objects: [Cell<Option<NonNull<T>>>; SIZE],
        len: Cell<usize>,
    }

    // SAFETY: both methods take the proof that the thread holds the GIL, and neither releases it.  The dead objects
    // belong to no thread.
    unsafe impl<T> Sync for FreeList<T> {}

    impl<T> FreeList<T> {
        pub const fn new() -> Self {
            Self { objects: [const { Cell::new(None) }; SIZE], len: Cell::new(0) }
        }

        /// Take a dead object, and make it an object again: with one reference, untracked, its fields as they were.
        #[inline(always)]
        pub fn pop(&self, _: Python<'_>) -> Option<NonNull<T>> {
            let len = self.len.get().checked_sub(1)?;
            self.len.set(len);
            let object = self.objects.get(len)?.get()?;
            // SAFETY: only `push` adds objects.  They begin with a `PyObject`, and belong to the list alone.
            unsafe { (*object.as_ptr().cast::<ffi::PyObject>()).ob_refcnt = ffi::PyObject_HEAD_INIT.ob_refcnt };
            Some(object)
        }

        /// Keep a dead object if there is room, and return whether there is.
        ///
        /// # Safety
        /// The object begins with a `PyObject`, is untracked, and owns a reference to its type.  No other code uses the
        /// object.
        #[inline(always)]
        pub unsafe fn push(&self, object: NonNull<T>, _: Python<'_>) -> bool {
            let len = self.len.get();
            let Some(free) = self.objects.get(len) else {
                return false;
            };
            free.set(Some(object));
            self.len.set(len + 1);
            true
        }
    }

    #[cfg(test)]
    mod tests {
        use std::ptr::NonNull;

        use pyo3::ffi;
        use pyo3::prelude::*;

        use super::{FreeList, SIZE};

        fn dead() -> NonNull<ffi::PyObject> {
            let object = ffi::PyObject { ob_type: &raw mut ffi::PyBaseObject_Type, ..ffi::PyObject_HEAD_INIT };
            NonNull::from(Box::leak(Box::new(object)))
        }

        fn references(object: NonNull<ffi::PyObject>) -> isize {
            // SAFETY: `object` is one of `dead()`.
            unsafe { ffi::Py_REFCNT(object.as_ptr()) as isize }
        }

        #[test]
        fn returns_the_last_object_first() {
            Python::initialize();
            Python::attach(|py| {
                let list = FreeList::new();
                assert_eq!(list.pop(py), None);
                let (first, second) = (dead(), dead());
                // SAFETY: both are dead objects, and only this test uses them.
                unsafe { assert!(list.push(first, py) && list.push(second, py)) };
                assert_eq!(list.pop(py), Some(second));
                assert_eq!(list.pop(py), Some(first));
                assert_eq!(list.pop(py), None);
            });
        }

        #[test]
        fn makes_a_dead_object_an_object_with_one_reference() {
            Python::initialize();
            Python::attach(|py| {
                let (list, object) = (FreeList::new(), dead());
                // SAFETY: a dead object, which only this test uses.
                unsafe {
                    ffi::Py_INCREF(object.as_ptr());
                    list.push(object, py);
                }
                assert_eq!(list.pop(py).map(references), Some(1));
            });
        }

        #[test]
        fn refuses_an_object_when_it_is_full() {
            Python::initialize();
            Python::attach(|py| {
                let list = FreeList::new();
                for _ in 0..SIZE {
                    // SAFETY: a dead object, which only this test uses.
                    assert!(unsafe { list.push(dead(), py) });
                }
                // SAFETY: as above.
                assert!(!unsafe { list.push(dead(), py) });
                assert!((0..SIZE).all(|_| list.pop(py).is_some()));
                assert_eq!(list.pop(py), None);
            });
        }
    }
}

#[cfg(Py_GIL_DISABLED)]
mod without_gil {
    use std::ptr::{self, NonNull};
    use std::sync::atomic::{AtomicPtr, Ordering};

    use pyo3::ffi;
    use pyo3::prelude::*;

    use crate::raw::thread;

    const SIZE: usize = 128;

    /// Dead objects of the type `T`: as a rule one for each thread.
    ///
    /// Threads that share an entry sometimes find it empty.
    pub struct FreeList<T>([Entry<T>; SIZE]);

    /// Two entries are neither in one cache line, nor in two lines that the processor fetches together.  Otherwise
    /// threads would wait for each other's writes.
    #[repr(align(128))]
    struct Entry<T>(AtomicPtr<T>);

    impl<T> FreeList<T> {
        pub const fn new() -> Self {
            Self([const { Entry(AtomicPtr::new(ptr::null_mut())) }; SIZE])
        }

        fn entry(&self, thread: usize) -> &AtomicPtr<T> {
            &self.0[thread % SIZE].0
        }

        /// Take the dead object of the thread with this number.
        #[inline(always)]
        pub fn take(&self, thread: usize) -> Option<NonNull<T>> {
            NonNull::new(self.entry(thread).swap(ptr::null_mut(), Ordering::Acquire))
        }

        /// Give the thread with this number a dead object if the thread has none, and return whether it had none.
        ///
        /// # Safety
        /// The same as for `push`.
        #[inline(always)]
        pub unsafe fn give(&self, thread: usize, object: NonNull<T>) -> bool {
            let entry = self.entry(thread);
            entry.compare_exchange(ptr::null_mut(), object.as_ptr(), Ordering::Release, Ordering::Relaxed).is_ok()
        }

        /// Take a dead object, and make it an object again: with one reference, untracked, its fields as they were.
        #[inline(always)]
        pub fn pop(&self, _: Python<'_>) -> Option<NonNull<T>> {
            let object = self.take(thread::number())?;
            // SAFETY: only `give` adds objects.  They begin with a `PyObject`, own a reference to their type, and
            // belong to the list alone.  This thread has just removed this object from the list, and is attached.
            unsafe {
                let header = object.as_ptr().cast::<ffi::PyObject>();
                let class = ffi::Py_TYPE(header);
                // `PyObject_Init` takes a second reference to the type.
                ffi::PyObject_Init(header, class);
                ffi::Py_DECREF(class.cast());
            }
            Some(object)
        }

        /// Keep a dead object if there is room, and return whether there is.
        ///
        /// # Safety
        /// The object begins with a `PyObject`, is untracked, and owns a reference to its type.  No other code uses the
        /// object.
        #[inline(always)]
        pub unsafe fn push(&self, object: NonNull<T>, _: Python<'_>) -> bool {
            // SAFETY: the caller promises the same.
            unsafe { self.give(thread::number(), object) }
        }
    }
}
