//! The object behind `SessionStore`.

use std::cell::{RefCell, UnsafeCell};
use std::ffi::{c_int, c_void};
use std::mem::offset_of;
use std::ptr::{self, NonNull};

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::critical_section::with_critical_section;

use super::pool::Pool;
use super::{Immortal, NO_MEMBER, Object, Outcome, Raised, member, new_type, returned, slot};
use crate::slots::Slots;

/// A `SessionStore`, as the interpreter lays it out.
#[repr(C)]
pub struct Store {
    ob_base: ffi::PyObject,
    weakrefs: *mut ffi::PyObject,
    inside: UnsafeCell<Inside>,
}

/// What is in a store.
pub struct Inside {
    pub token: Option<Object>,
    pub sessions: Slots<Object>,
    pub manual: bool,
    pub closed: bool,
}

/// There is one for every request: smaller than the twin's.
const _: () = assert!(cfg!(Py_GIL_DISABLED) || size_of::<Store>() <= 7 * size_of::<usize>());

static TYPE: Immortal<ffi::PyTypeObject> = Immortal::new();

static POOL: Pool<Store> = Pool::new();

impl Store {
    /// Make the type.
    pub fn install(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        static mut MEMBERS: [ffi::PyMemberDef; 2] =
            [member(c"__weaklistoffset__", offset_of!(Store, weakrefs)), NO_MEMBER];
        let class = new_type(
            py,
            c"ctxalchemy.SessionStore",
            size_of::<Store>(),
            0,
            &mut [
                slot(ffi::Py_tp_new, new as *const c_void),
                slot(ffi::Py_tp_traverse, traverse as *const c_void),
                slot(ffi::Py_tp_clear, clear as *const c_void),
                slot(ffi::Py_tp_dealloc, dealloc as *const c_void),
                slot(ffi::Py_tp_members, &raw const MEMBERS),
                slot::<c_void>(0, ptr::null()),
            ],
        )?;
        TYPE.set(class.clone());
        Ok(class)
    }

    #[inline(always)]
    pub fn new(py: Python<'_>, manual: bool) -> Outcome<'_, Store> {
        // SAFETY: the object, from the pool or new, is a `Store`; every field is set before anyone
        // else, the collector included, sees it.
        unsafe {
            let store = match POOL.take() {
                Some(store) => store.as_ptr(),
                None => ffi::PyObject_GC_New::<Store>(TYPE.get()),
            };
            if store.is_null() {
                return Err(Raised);
            }
            (*store).weakrefs = ptr::null_mut();
            (&raw mut (*store).inside).write(UnsafeCell::new(Inside {
                token: None,
                sessions: Slots::new(),
                manual,
                closed: false,
            }));
            ffi::PyObject_GC_Track(store.cast());
            Ok(Bound::from_owned_ptr(py, store.cast()).cast_into_unchecked())
        }
    }

    /// The object as a store, if it is one.
    #[inline(always)]
    pub fn of<'a, 'py>(object: &'a Bound<'py, PyAny>) -> Option<&'a Bound<'py, Store>> {
        // SAFETY: the type cannot be subclassed, so an instance is one of exactly that type.
        unsafe { (ffi::Py_TYPE(object.as_ptr()) == TYPE.get()).then(|| object.cast_unchecked()) }
    }

    /// Look at what is in the store, or change it, alone.
    ///
    /// `body` runs no Python code: it makes no objects and drops none; it moves them out instead.
    #[inline(always)]
    pub fn with<R>(store: &Bound<'_, Store>, body: impl FnOnce(&mut Inside) -> R) -> R {
        with_critical_section(store.as_any(), || {
            // SAFETY: the thread is attached, on a free-threaded build the object is locked, and as
            // `body` runs no Python code nothing else gets here before it is done.
            body(unsafe { &mut *(*store.as_ptr().cast::<Store>()).inside.get() })
        })
    }
}

unsafe extern "C" fn new(
    _class: *mut ffi::PyTypeObject,
    _arguments: *mut ffi::PyObject,
    _named: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: called by the interpreter.  The class cannot be another, and the arguments are `__init__`'s.
    let py = unsafe { Python::assume_attached() };
    returned(|| Store::new(py, false).map(Bound::into_any))
}

unsafe extern "C" fn traverse(store: *mut ffi::PyObject, visit: ffi::visitproc, argument: *mut c_void) -> c_int {
    // SAFETY: called by the garbage collector with an object of this type, while no other code runs.
    let inside = unsafe { &*(*store.cast::<Store>()).inside.get() };
    let pairs = inside.sessions.iter().flat_map(|(key, session)| [key, session]);
    // SAFETY: each reference that the object owns, the one to its type included, is visited once.
    unsafe {
        let class = ffi::Py_TYPE(store).cast();
        for object in pairs.chain(&inside.token).map(Object::as_ptr).chain([class]) {
            let stop = visit(object, argument);
            if stop != 0 {
                return stop;
            }
        }
    }
    0
}

unsafe extern "C" fn clear(store: *mut ffi::PyObject) -> c_int {
    // SAFETY: called with an object of this type, by an attached thread.
    let emptied = unsafe {
        let store = Bound::from_borrowed_ptr(Python::assume_attached(), store).cast_into_unchecked::<Store>();
        Store::with(&store, |inside| (inside.token.take(), inside.sessions.take()))
    };
    drop(emptied);
    0
}

unsafe extern "C" fn dealloc(object: *mut ffi::PyObject) {
    let store: *mut Store = object.cast();
    // SAFETY: nobody else has the object any more.  Its contents are moved out and dropped once;
    // dropping them may run any code, which cannot reach it.
    unsafe {
        ffi::PyObject_GC_UnTrack(object.cast());
        if !(*store).weakrefs.is_null() {
            ffi::PyObject_ClearWeakRefs(object);
        }
        let Inside { token, sessions, .. } = (&raw const (*store).inside).read().into_inner();
        if !POOL.put(NonNull::new_unchecked(store)) {
            let class = ffi::Py_TYPE(object);
            ffi::PyObject_GC_Del(object.cast());
            ffi::Py_DECREF(class.cast());
        }
        drop(sessions);
        if let Some(token) = token {
            drop_token(token);
        }
    }
}

/// Drop the token of a context that was never left.
///
/// It holds the context before, whose token holds the one before that, and so on: a chain of any
/// length, which is taken apart link by link so that it does not use up the stack.
#[cold]
fn drop_token(token: Object) {
    thread_local! {
        static WAITING: RefCell<Option<Vec<Object>>> = const { RefCell::new(None) };
    }
    let token = WAITING.with_borrow_mut(|waiting| match waiting {
        Some(waiting) => {
            waiting.push(token);
            None
        }
        None => {
            *waiting = Some(Vec::new());
            Some(token)
        }
    });
    let mut next = token;
    while let Some(token) = next {
        drop(token);
        next = WAITING.with_borrow_mut(|waiting| {
            let token = waiting.as_mut().and_then(Vec::pop);
            if token.is_none() {
                *waiting = None;
            }
            token
        });
    }
}
