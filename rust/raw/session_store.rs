//! The objects of the type `SessionStore`.

use std::cell::RefCell;
use std::ffi::{c_int, c_ulong, c_void};
use std::mem::offset_of;
use std::ptr::{self, NonNull};

use pyo3::ffi;
use pyo3::prelude::*;

use super::coroutine::forget_connect;
use super::free_list::FreeList;
use super::immortal::Immortal;
use super::locked::Locked;
use super::object::Object;
use super::outcome::{Argument, Outcome, Raised, into_raw};
use super::types::{NO_MEMBER, new_type, offset, slot, table};
use crate::slots::Slots;

/// A context, in the memory layout of a Python object.
///
/// There is no reference to a whole `SessionStore` in Rust, because the interpreter changes its header at any time.
#[repr(C)]
pub struct SessionStore {
    ob_base: ffi::PyObject,
    weakrefs: *mut ffi::PyObject,
    contents: Locked<Contents>,
}

struct Contents {
    token: Option<Object>,
    sessions: Slots<Object>,
    /// The thread of the event loop to which the sessions belong, or `ANY_THREAD`.  Without the GIL, this is the number
    /// of the thread in `thread`.
    thread: c_ulong,
    manual: bool,
    /// The sessions are those of the read-only engines.
    read_only: bool,
    closed: bool,
}

/// The thread of a context that was opened without an event loop and has not been used in one.
const ANY_THREAD: c_ulong = 0;

/// The result of `SessionStore::lookup`.
pub enum Lookup<'py> {
    Session(Bound<'py, PyAny>),
    NoSession,
    /// The context belongs to the event loop of another thread, or to none yet.
    NotOfThisThread,
}

/// A database and its session.
type Pair<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>);

/// Each request has one: it must be smaller than the object of the reference implementation.
const _: () = assert!(cfg!(Py_GIL_DISABLED) || size_of::<SessionStore>() <= size_of::<[usize; 8]>());

static TYPE: Immortal<ffi::PyTypeObject> = Immortal::new();

static FREE_LIST: FreeList<SessionStore> = FreeList::new();

impl SessionStore {
    /// Create the type.
    pub fn install(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        let members = table(vec![offset(c"__weaklistoffset__", offset_of!(SessionStore, weakrefs)), NO_MEMBER]);
        // SAFETY: the functions are for objects of this type, and the table ends with `NO_MEMBER`.  The type is new.
        unsafe {
            let class = new_type(
                py,
                c"ctxalchemy.SessionStore",
                size_of::<SessionStore>(),
                0,
                &[
                    slot(ffi::Py_tp_new, new as *const c_void),
                    slot(ffi::Py_tp_traverse, traverse as *const c_void),
                    slot(ffi::Py_tp_clear, clear as *const c_void),
                    slot(ffi::Py_tp_dealloc, dealloc as *const c_void),
                    slot(ffi::Py_tp_members, members),
                ],
            )?;
            TYPE.set(class.clone());
            Ok(class)
        }
    }

    #[inline(always)]
    pub fn new(py: Python<'_>, manual: bool, read_only: bool, of_this_thread: bool) -> Outcome<'_, SessionStore> {
        let store = match FREE_LIST.pop(py) {
            Some(store) => store.as_ptr(),
            None => Self::allocate()?.as_ptr(),
        };
        let thread = if of_this_thread { this_thread(py) } else { ANY_THREAD };
        let contents = Contents { token: None, sessions: Slots::new(), thread, manual, read_only, closed: false };
        // SAFETY: the object is a `SessionStore` that no other code uses.  Every field is set before the garbage
        // collector tracks the object.
        unsafe {
            (&raw mut (*store).weakrefs).write(ptr::null_mut());
            (&raw mut (*store).contents).write(Locked::new(contents));
            ffi::PyObject_GC_Track(store.cast());
            Ok(Bound::from_owned_ptr(py, store.cast()).cast_into_unchecked())
        }
    }

    /// A new object, without its fields.
    fn allocate() -> Result<NonNull<Self>, Raised> {
        let class = TYPE.get()?;
        // SAFETY: the objects of this type are as large as a `SessionStore`.
        NonNull::new(unsafe { ffi::PyObject_GC_New(class.as_ptr()) }).ok_or(Raised::by_interpreter())
    }

    /// The object as a `SessionStore`, if it is one.
    #[inline(always)]
    pub fn of<'a, 'py>(object: &'a Bound<'py, PyAny>) -> Option<&'a Bound<'py, SessionStore>> {
        // SAFETY: only `new` creates objects of this type, which has no subclasses.
        unsafe { ptr::eq(ffi::Py_TYPE(object.as_ptr()), TYPE.as_ptr()).then(|| object.cast_unchecked()) }
    }

    /// # Safety
    /// `body` runs no Python code, as `Locked::with` requires.
    #[inline(always)]
    unsafe fn with<R>(this: &Bound<'_, Self>, body: impl FnOnce(&mut Contents) -> R) -> R {
        let store: *mut Self = this.as_ptr().cast();
        // SAFETY: `this` is a `SessionStore` of which every field is set, and the caller promises the rest.
        unsafe { (*store).contents.with(this.as_any(), body) }
    }

    /// Make the context what `new` returns: open and empty.
    pub fn reinitialize(this: &Bound<'_, Self>, manual: bool, read_only: bool) {
        // SAFETY: the old contents are moved out, and dropped after the access.
        let old = unsafe {
            Self::with(this, |contents| {
                contents.manual = manual;
                contents.read_only = read_only;
                contents.closed = false;
                let sessions = contents.take_sessions();
                contents.thread = ANY_THREAD;
                (sessions, contents.token.take())
            })
        };
        drop(old.0.release(this.py()));
        drop(old.1);
    }

    pub fn is_manual(this: &Bound<'_, Self>) -> bool {
        // SAFETY: no Python code runs.
        unsafe { Self::with(this, |contents| contents.manual) }
    }

    pub fn is_read_only(this: &Bound<'_, Self>) -> bool {
        // SAFETY: no Python code runs.
        unsafe { Self::with(this, |contents| contents.read_only) }
    }

    pub fn is_closed(this: &Bound<'_, Self>) -> bool {
        // SAFETY: no Python code runs.
        unsafe { Self::with(this, |contents| contents.closed) }
    }

    pub fn len(this: &Bound<'_, Self>) -> usize {
        // SAFETY: no Python code runs.
        unsafe { Self::with(this, |contents| contents.sessions.len()) }
    }

    #[inline(always)]
    pub fn token<'py>(this: &Bound<'py, Self>) -> Option<Bound<'py, PyAny>> {
        // SAFETY: a new reference to an object runs no Python code.
        unsafe { Self::with(this, |contents| contents.token.as_ref().map(|token| token.to_bound(this.py()))) }
    }

    #[inline(always)]
    pub fn set_token<'py>(this: &Bound<'py, Self>, token: Option<Bound<'py, PyAny>>) {
        let token = token.map(Object::from);
        // SAFETY: the old token is moved out, and dropped after the access.
        drop(unsafe { Self::with(this, |contents| std::mem::replace(&mut contents.token, token)) });
    }

    /// Whether the context belongs to the event loop of a thread.
    pub fn has_thread(this: &Bound<'_, Self>) -> bool {
        // SAFETY: no Python code runs.
        unsafe { Self::with(this, |contents| contents.thread != ANY_THREAD) }
    }

    /// Whether the context belongs to the event loop of the current thread.
    pub fn is_of_this_thread(this: &Bound<'_, Self>) -> bool {
        let thread = this_thread(this.py());
        // SAFETY: no Python code runs.
        unsafe { Self::with(this, |contents| contents.thread == thread) }
    }

    /// Let the context belong to the event loop of the current thread.
    pub fn set_thread(this: &Bound<'_, Self>) {
        let thread = this_thread(this.py());
        // SAFETY: no Python code runs.
        unsafe { Self::with(this, |contents| contents.thread = thread) }
    }

    /// The session of this database, for code in the thread of the context.
    #[inline(always)]
    pub fn lookup<'py>(this: &Bound<'py, Self>, database: Argument<'_, 'py>) -> Lookup<'py> {
        let py = this.py();
        let thread = this_thread(py);
        // SAFETY: comparisons and a new reference to an object run no Python code.
        unsafe {
            Self::with(this, |contents| {
                if contents.thread != thread {
                    return Lookup::NotOfThisThread;
                }
                match contents.sessions.get(|key| key.is(database)) {
                    Some(session) => Lookup::Session(session.to_bound(py)),
                    None => Lookup::NoSession,
                }
            })
        }
    }

    /// The session of this database.
    pub fn get<'py>(this: &Bound<'py, Self>, database: Argument<'_, 'py>) -> Option<Bound<'py, PyAny>> {
        // SAFETY: a comparison of pointers and a new reference to an object run no Python code.
        unsafe {
            Self::with(this, |contents| {
                let session = contents.sessions.get(|key| key.is(database))?;
                Some(session.to_bound(this.py()))
            })
        }
    }

    /// Set the session of this database, and return whether the context is open.  A closed context does not change.
    pub fn put<'py>(this: &Bound<'py, Self>, database: Argument<'_, 'py>, session: Argument<'_, 'py>) -> bool {
        let pair = (database.to_owned().into(), session.to_owned().into());
        // SAFETY: a comparison of pointers runs no Python code.  The pair that is replaced or refused is moved out, and
        // dropped after the access.
        let unused = unsafe {
            Self::with(this, |contents| {
                if contents.closed {
                    return Err(pair);
                }
                Ok(contents.sessions.put(pair.0, pair.1, |key| key.is(database)))
            })
        };
        unused.is_ok()
    }

    /// Remove and return the session of this database.
    pub fn pop<'py>(this: &Bound<'py, Self>, database: Argument<'_, 'py>) -> Option<Bound<'py, PyAny>> {
        // SAFETY: a comparison of pointers runs no Python code.  The pair is moved out.
        let (pair, thread) =
            unsafe { Self::with(this, |contents| (contents.sessions.pop(|key| key.is(database)), contents.thread)) };
        pair.map(|(_database, session)| {
            forget_connect(this.py(), thread);
            session.into_bound(this.py())
        })
    }

    /// All databases and their sessions, in insertion order.
    pub fn items<'py>(this: &Bound<'py, Self>) -> Vec<Pair<'py>> {
        // SAFETY: new references to objects run no Python code.
        pairs(this.py(), unsafe { Self::with(this, |contents| contents.sessions.clone()) })
    }

    /// Remove all sessions, and return what `items` would have returned.
    pub fn clear<'py>(this: &Bound<'py, Self>) -> Vec<Pair<'py>> {
        // SAFETY: the sessions are moved out.
        let taken = unsafe { Self::with(this, Contents::take_sessions) };
        pairs(this.py(), taken.release(this.py()))
    }

    /// Close the context, remove all sessions, and return what `items` would have returned.
    pub fn close<'py>(this: &Bound<'py, Self>) -> Vec<Pair<'py>> {
        // SAFETY: the sessions are moved out.
        let taken = unsafe {
            Self::with(this, |contents| {
                contents.closed = true;
                contents.take_sessions()
            })
        };
        pairs(this.py(), taken.release(this.py()))
    }
}

impl Contents {
    fn take_sessions(&mut self) -> Taken {
        Taken(self.sessions.take(), self.thread)
    }
}

/// Sessions that were moved out of a context, and the thread of the context.
struct Taken(Slots<Object>, c_ulong);

impl Taken {
    /// The sessions.  The thread does not keep their databases for its next coroutine any more.
    fn release(self, py: Python<'_>) -> Slots<Object> {
        if self.0.len() > 0 {
            forget_connect(py, self.1);
        }
        self.0
    }
}

#[inline(always)]
fn this_thread(_: Python<'_>) -> c_ulong {
    #[cfg(Py_GIL_DISABLED)]
    return super::thread::number() as c_ulong;
    // SAFETY: the function has no requirements.
    #[cfg(not(Py_GIL_DISABLED))]
    return unsafe { ffi::PyThread_get_thread_ident() };
}

fn pairs(py: Python<'_>, sessions: Slots<Object>) -> Vec<Pair<'_>> {
    let pairs = sessions.into_vec().into_iter();
    pairs.map(|(database, session)| (database.into_bound(py), session.into_bound(py))).collect()
}

unsafe extern "C" fn new(
    _class: *mut ffi::PyTypeObject,
    _arguments: *mut ffi::PyObject,
    _named: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls this function, with the thread attached.  The class has no subclasses, and the
    // arguments are for `__init__`.
    let py = unsafe { Python::assume_attached() };
    into_raw(|| SessionStore::new(py, false, false, false).map(Bound::into_any))
}

unsafe extern "C" fn traverse(object: *mut ffi::PyObject, visit: ffi::visitproc, argument: *mut c_void) -> c_int {
    let store: *mut SessionStore = object.cast();
    // SAFETY: the garbage collector calls this function with an object of this type, while no other code changes the
    // object.  Each reference that the object owns, the one to its type included, is visited once.
    unsafe {
        let class = ffi::Py_TYPE(object).cast();
        let contents = (*store).contents.peek();
        let pairs = contents.sessions.iter().flat_map(|(database, session)| [database, session]);
        for object in pairs.chain(&contents.token).map(Object::as_ptr).chain([class]) {
            let stop = visit(object, argument);
            if stop != 0 {
                return stop;
            }
        }
    }
    0
}

unsafe extern "C" fn clear(object: *mut ffi::PyObject) -> c_int {
    // SAFETY: the interpreter calls this function with an object of this type, and with the thread attached.  The
    // contents are moved out, and dropped after the access.
    let cleared = unsafe {
        let object = Argument::from_ptr(Python::assume_attached(), object);
        let store = object.cast_unchecked::<SessionStore>();
        let (token, taken) = SessionStore::with(&store, |contents| (contents.token.take(), contents.take_sessions()));
        (token, taken.release(store.py()))
    };
    drop(cleared);
    0
}

unsafe extern "C" fn dealloc(object: *mut ffi::PyObject) {
    let store: *mut SessionStore = object.cast();
    // SAFETY: the interpreter calls this function with the thread attached, and with an object of this type to which
    // there is no reference any more.  The contents are moved out and dropped once.  Dropping them may run Python code,
    // but after the object has become a dead one.  A dead object keeps the reference to its type, and a freed one
    // drops it.
    unsafe {
        ffi::PyObject_GC_UnTrack(object.cast());
        if !(*store).weakrefs.is_null() {
            ffi::PyObject_ClearWeakRefs(object);
        }
        let mut contents = (&raw const (*store).contents).read().into_inner();
        let taken = contents.take_sessions();
        if !FREE_LIST.push(NonNull::new_unchecked(store), Python::assume_attached()) {
            let class = ffi::Py_TYPE(object);
            ffi::PyObject_GC_Del(object.cast());
            ffi::Py_DECREF(class.cast());
        }
        drop(taken.release(Python::assume_attached()));
        if let Some(token) = contents.token {
            drop_token(token);
        }
    }
}

/// Drop the token of a context that was never reset.
///
/// The token owns the outer context, the token of the outer context owns the next outer one, and so on.  The chain may
/// have any length.  It is dropped one context after another, because recursion would exhaust the stack.
#[cold]
fn drop_token(token: Object) {
    thread_local! {
        // The tokens that the outermost call of this function still has to drop, while there is such a call.
        static WAITING: RefCell<Option<Vec<Object>>> = const { RefCell::new(None) };
    }
    let first = WAITING.with_borrow_mut(|waiting| match waiting {
        Some(waiting) => {
            waiting.push(token);
            None
        }
        None => {
            *waiting = Some(Vec::new());
            Some(token)
        }
    });
    let mut next = first;
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
