//! The object that `db_session()` returns.  Callers cannot distinguish it from the coroutine of an `async def`.
//!
//! This module has the memory layout, the state, and the functions that the interpreter calls.  What the coroutine does
//! comes from a `CoroutineBody`.

use std::cell::UnsafeCell;
use std::ffi::{CStr, c_int, c_void};
use std::mem::{forget, offset_of, transmute};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use pyo3::exceptions::{PyRuntimeError, PyRuntimeWarning};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use pyo3::{Borrowed, IntoPyObjectExt};

use super::free_list::FreeList;
use super::immortal::Immortal;
use super::locked::Locked;
use super::object::Object;
use super::outcome::{Argument, Outcome, Raised, catch_panic, into_raw};
use super::stop_iteration::{ReusableStopIteration, stop_iteration};
use super::types::{NO_GETTER, NO_MEMBER, NO_METHOD, getter, method, new_type, offset, slot, table};

/// What a coroutine does.
pub trait CoroutineBody: 'static {
    /// The attributes, by name.
    const ATTRIBUTES: &'static [(&'static CStr, Attribute)];

    /// Start a new coroutine, if it can end at once.  A panic aborts the process.
    fn start<'a, 'py>(running: Running<'a, 'py>) -> Started<'a, 'py>;

    /// Go on with a coroutine that has started and could not end at once.
    fn wait<'a, 'py>(running: Running<'a, 'py>, needed: Bound<'py, PyAny>) -> Result<SendResult<'a, 'py>, Raised>;

    /// Run a coroutine that is not new, or to which a value is sent.
    fn resume<'a, 'py>(
        coroutine: &'a Bound<'py, Coroutine>,
        value: &Bound<'py, PyAny>,
    ) -> Result<SendResult<'a, 'py>, Raised>;

    /// Raise an exception in the coroutine, and return what the coroutine yields.
    fn throw<'py>(coroutine: &Bound<'py, Coroutine>, arguments: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>>;

    /// Raise GeneratorExit in the coroutine.
    fn close(coroutine: &Bound<'_, Coroutine>) -> PyResult<()>;
}

/// A function that returns the value of an attribute.
pub type Attribute = for<'py> fn(&Bound<'py, Coroutine>) -> PyResult<Bound<'py, PyAny>>;

/// A coroutine, in the memory layout of a Python object.
///
/// Several references to one coroutine exist at the same time, even in several threads.  Therefore every field that
/// changes while the coroutine is alive is in a cell or is atomic.
#[repr(C)]
pub struct Coroutine {
    /// The interpreter changes the header and the weak references at any time.  They are not accessed here.
    ob_base: UnsafeCell<ffi::PyObject>,
    connect: Object,
    /// The coroutine of `create_session`, from the first wait on.
    awaited: Locked<Option<Object>>,
    /// Only `Returned::raise` and `dealloc` access this field.  `Returned::raise` is called at most once, and before
    /// `dealloc`.
    stop_iteration: ReusableStopIteration,
    weakrefs: UnsafeCell<*mut ffi::PyObject>,
    state: AtomicU8,
    /// Whether the garbage collector tracks the coroutine.
    tracked: AtomicBool,
    finalized: AtomicBool,
    /// Whether the coroutine has returned a session to an `await`.
    #[cfg(Py_GIL_DISABLED)]
    returned: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// The coroutine has not started.
    New,
    /// A thread is running the coroutine: there is a `Running` of it.
    Running,
    /// The coroutine waits for the one of `create_session`.
    Suspended,
    /// The coroutine has returned, raised an exception, or was closed.
    Done,
}

/// The result of a `send()` that raised no exception.
#[must_use]
pub enum SendResult<'a, 'py> {
    Yielded(Bound<'py, PyAny>),
    Returned(Returned<'a, 'py>),
}

/// The first step of a coroutine.
pub enum Started<'a, 'py> {
    Returned(Returned<'a, 'py>),
    Raised(Raised),
    /// The coroutine must wait.  The object is for `CoroutineBody::wait`.
    MustWait(Running<'a, 'py>, Bound<'py, PyAny>),
}

/// The value that a coroutine has returned.
pub struct Returned<'a, 'py> {
    coroutine: &'a Bound<'py, Coroutine>,
    value: Bound<'py, PyAny>,
}

/// The exclusive right to run a coroutine.
///
/// There is at most one `Running` of a coroutine at a time, and no new one after the coroutine is done.  The methods
/// set the next state.  Dropping a `Running` sets the state `Done`.
#[must_use]
pub struct Running<'a, 'py>(&'a Bound<'py, Coroutine>);

static TYPE: Immortal<ffi::PyTypeObject> = Immortal::new();

static FREE_LIST: FreeList<Coroutine> = FreeList::new();

impl Coroutine {
    /// Create the type, whose objects do what `B` implements.
    pub fn install<B: CoroutineBody>(py: Python<'_>) -> PyResult<()> {
        // SAFETY: the objects of the type are of the size of a `Coroutine`.  The type is new.
        unsafe { TYPE.set(new_coroutine_type::<B>(py)?) };
        Ok(())
    }

    /// A new coroutine for this database.
    #[inline(always)]
    pub fn create<'py>(connect: Argument<'_, 'py>) -> Outcome<'py> {
        let py = connect.py();
        let coroutine = match FREE_LIST.pop(py) {
            Some(coroutine) => coroutine.as_ptr(),
            None => Self::allocate()?.as_ptr(),
        };
        // SAFETY: the object is a `Coroutine` that no other code uses, of which `stop_iteration` is set, and without the
        // GIL also the kept database.  Every other field is set here.  The garbage collector does not track the object
        // yet.  Dropping the database that was kept may run Python code, but after every field is set.
        unsafe {
            let unused = kept_connect::set(coroutine, connect);
            (&raw mut (*coroutine).awaited).write(Locked::new(None));
            (&raw mut (*coroutine).weakrefs).write(UnsafeCell::new(ptr::null_mut()));
            (&raw mut (*coroutine).state).write(AtomicU8::new(State::New as u8));
            (&raw mut (*coroutine).tracked).write(AtomicBool::new(false));
            (&raw mut (*coroutine).finalized).write(AtomicBool::new(false));
            #[cfg(Py_GIL_DISABLED)]
            (&raw mut (*coroutine).returned).write(AtomicBool::new(false));
            drop(unused);
            Ok(Bound::from_owned_ptr(py, coroutine.cast()))
        }
    }

    /// A new object, of which only `stop_iteration` is set, and without the GIL that no database is kept.
    fn allocate() -> Result<NonNull<Self>, Raised> {
        let class = TYPE.get()?;
        // SAFETY: the objects of this type are as large as a `Coroutine`, and the field is a part of the new object.
        unsafe {
            let object = ffi::PyObject_GC_New::<Self>(class.as_ptr());
            let coroutine = NonNull::new(object).ok_or(Raised::by_interpreter())?;
            (&raw mut (*coroutine.as_ptr()).stop_iteration).write(ReusableStopIteration::new());
            kept_connect::init(coroutine.as_ptr());
            Ok(coroutine)
        }
    }

    /// # Safety
    /// `object` is a `Coroutine` that is not freed during the lifetime `'a`.
    #[inline(always)]
    unsafe fn from_ptr<'a, 'py>(py: Python<'py>, object: *mut ffi::PyObject) -> Borrowed<'a, 'py, Self> {
        // SAFETY: the caller promises the same.
        unsafe { Borrowed::<PyAny>::from_ptr(py, object).cast_unchecked() }
    }

    #[inline(always)]
    fn fields<'a>(this: &'a Bound<'_, Self>) -> &'a Self {
        // SAFETY: `this` is a `Coroutine` of which every field is set, and keeps it alive.  All that changes meanwhile
        // is in cells.
        unsafe { &*this.as_ptr().cast() }
    }

    /// The database.
    #[inline(always)]
    pub fn connect<'a, 'py>(this: &'a Bound<'py, Self>) -> Argument<'a, 'py> {
        Self::fields(this).connect.as_argument(this.py())
    }

    #[inline(always)]
    pub fn state(this: &Bound<'_, Self>) -> State {
        match Self::fields(this).state.load(Ordering::Acquire) {
            0 => State::New,
            1 => State::Running,
            2 => State::Suspended,
            _ => State::Done,
        }
    }

    /// Run the coroutine if it is new.
    #[inline(always)]
    pub fn start<'a, 'py>(this: &'a Bound<'py, Self>) -> Option<Running<'a, 'py>> {
        Self::run_from(this, State::New)
    }

    /// Run the coroutine if it is suspended.
    pub fn resume<'a, 'py>(this: &'a Bound<'py, Self>) -> Option<Running<'a, 'py>> {
        Self::run_from(this, State::Suspended)
    }

    #[inline(always)]
    fn run_from<'a, 'py>(this: &'a Bound<'py, Self>, from: State) -> Option<Running<'a, 'py>> {
        let running = if cfg!(Py_GIL_DISABLED) {
            let (from, to) = (from as u8, State::Running as u8);
            Self::fields(this).state.compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed).is_ok()
        } else {
            let running = Self::state(this) == from;
            if running {
                Self::set_state(this, State::Running);
            }
            running
        };
        running.then(|| Running(this))
    }

    #[inline(always)]
    fn set_state(this: &Bound<'_, Self>, state: State) {
        Self::fields(this).state.store(state as u8, Ordering::Release);
    }

    /// What the coroutine waits for, from the first wait on.
    pub fn awaited<'py>(this: &Bound<'py, Self>) -> Option<Bound<'py, PyAny>> {
        // SAFETY: the value is a part of `this`.  A new reference to an object runs no Python code.
        unsafe {
            Self::fields(this)
                .awaited
                .with(this.as_any(), |awaited| awaited.as_ref().map(|awaited| awaited.to_bound(this.py())))
        }
    }

    fn set_awaited<'py>(this: &Bound<'py, Self>, awaited: Option<Bound<'py, PyAny>>) {
        let awaited = awaited.map(Object::from);
        let replace = |field: &mut Option<Object>| std::mem::replace(field, awaited);
        // SAFETY: the value is a part of `this`.  The old reference is moved out, and dropped after the access.
        drop(unsafe { Self::fields(this).awaited.with(this.as_any(), replace) });
    }

    /// Let the garbage collector track the coroutine, unless it does so already.
    fn track(this: &Bound<'_, Self>) {
        if !Self::fields(this).tracked.swap(true, Ordering::Relaxed) {
            // SAFETY: every field is set, and the collector did not track the object.
            unsafe { ffi::PyObject_GC_Track(this.as_ptr().cast()) };
        }
    }
}

impl<'a, 'py> Running<'a, 'py> {
    /// Set what the coroutine waits for.
    pub fn set_awaited(&self, awaited: Bound<'py, PyAny>) {
        Coroutine::set_awaited(self.0, Some(awaited));
        // From now on the coroutine can be part of a cycle: a task may wait for what the same task is to do.
        Coroutine::track(self.0);
    }

    /// Send a value to `awaited`.  What `awaited` yields or returns, this coroutine yields or returns too.
    pub fn send(self, awaited: &Bound<'py, PyAny>, value: &Bound<'py, PyAny>) -> Result<SendResult<'a, 'py>, Raised> {
        let mut result = ptr::null_mut();
        // SAFETY: both are objects.  The result is an owned reference, unless the result is an error.
        let (status, result) = unsafe {
            let status = ffi::PyIter_Send(awaited.as_ptr(), value.as_ptr(), &mut result);
            (status, Bound::from_owned_ptr_or_opt(self.0.py(), result))
        };
        match (status, result) {
            (ffi::PySendResult::PYGEN_NEXT, Some(yielded)) => {
                self.suspend();
                Ok(SendResult::Yielded(yielded))
            }
            (ffi::PySendResult::PYGEN_RETURN, Some(value)) => Ok(SendResult::Returned(self.return_value(value))),
            _ => Err(Raised::by_interpreter()),
        }
    }

    /// Return this value from the coroutine, which is done.
    #[inline(always)]
    pub fn return_value(self, value: Bound<'py, PyAny>) -> Returned<'a, 'py> {
        Returned { coroutine: self.0, value }
    }

    #[inline(always)]
    pub fn coroutine(&self) -> &'a Bound<'py, Coroutine> {
        self.0
    }

    /// Stop running the coroutine, which waits again.
    pub fn suspend(self) {
        self.stop(State::Suspended);
    }

    /// Stop running the coroutine, which has not started after all.
    pub fn undo_start(self) {
        self.stop(State::New);
    }

    fn stop(self, state: State) {
        Coroutine::set_state(self.0, state);
        forget(self);
    }
}

impl Drop for Running<'_, '_> {
    #[inline(always)]
    fn drop(&mut self) {
        Coroutine::set_state(self.0, State::Done);
    }
}

impl<'py> Returned<'_, 'py> {
    #[inline(always)]
    fn into_value(self) -> Bound<'py, PyAny> {
        self.value
    }

    /// Raise the StopIteration with the value.
    ///
    /// No other thread uses `stop_iteration` at this time: only `Running::return_value` creates a `Returned`, and a
    /// coroutine that is done never runs again.
    #[inline(always)]
    fn raise(self) {
        let coroutine = Coroutine::fields(self.coroutine);
        #[cfg(Py_GIL_DISABLED)]
        coroutine.returned.store(true, Ordering::Relaxed);
        coroutine.stop_iteration.raise(self.value);
    }
}

const SEND_DOC: &CStr =
    c"send($self, arg, /)\n--\n\nSend a value into the coroutine; return what it yields, or raise StopIteration.";

fn new_coroutine_type<B: CoroutineBody>(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    let methods = table(vec![
        method(c"send", ffi::PyMethodDefPointer { PyCFunction: send::<B> }, ffi::METH_O, Some(SEND_DOC)),
        method(
            c"throw",
            ffi::PyMethodDefPointer { PyCFunction: throw::<B> },
            ffi::METH_VARARGS,
            Some(c"Raise an exception inside the coroutine; return what it yields, or raise StopIteration."),
        ),
        method(
            c"close",
            ffi::PyMethodDefPointer { PyCFunction: close::<B> },
            ffi::METH_NOARGS,
            Some(c"close($self, /)\n--\n\nRaise GeneratorExit inside the coroutine."),
        ),
        NO_METHOD,
    ]);
    let attributes = B::ATTRIBUTES.iter().map(|(name, attribute)| getter(name, get, *attribute as *mut c_void));
    let getters = table(attributes.chain([NO_GETTER]).collect());
    let members = table(vec![offset(c"__weaklistoffset__", offset_of!(Coroutine, weakrefs)), NO_MEMBER]);
    // SAFETY: the functions are for objects of this type, and each table ends with its end entry.
    unsafe {
        new_type(
            py,
            c"ctxalchemy._native.coroutine",
            size_of::<Coroutine>(),
            ffi::Py_TPFLAGS_DISALLOW_INSTANTIATION | ffi::Py_TPFLAGS_IMMUTABLETYPE,
            &[
                slot(ffi::Py_am_await, am_await as *const c_void),
                slot(ffi::Py_am_send, am_send::<B> as *const c_void),
                slot(ffi::Py_tp_iter, ffi::PyObject_SelfIter as *const c_void),
                slot(ffi::Py_tp_iternext, iternext::<B> as *const c_void),
                slot(ffi::Py_tp_repr, repr as *const c_void),
                slot(ffi::Py_tp_finalize, finalize as *const c_void),
                slot(ffi::Py_tp_traverse, traverse as *const c_void),
                slot(ffi::Py_tp_clear, clear as *const c_void),
                slot(ffi::Py_tp_dealloc, dealloc as *const c_void),
                slot(ffi::Py_tp_methods, methods),
                slot(ffi::Py_tp_getset, getters),
                slot(ffi::Py_tp_members, members),
            ],
        )
    }
}

unsafe extern "C" fn am_await(object: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls this function with an object of this type, and with the thread attached.
    let coroutine = unsafe { Coroutine::from_ptr(Python::assume_attached(), object) };
    if Coroutine::state(&coroutine) == State::Suspended {
        return into_raw(|| Err(PyRuntimeError::new_err("coroutine is being awaited already").into()));
    }
    coroutine.to_owned().into_ptr()
}

unsafe extern "C" fn am_send<B: CoroutineBody>(
    object: *mut ffi::PyObject,
    value: *mut ffi::PyObject,
    result: *mut *mut ffi::PyObject,
) -> ffi::PySendResult {
    // SAFETY: the interpreter calls this function with an object of this type and a value, and with the thread
    // attached.
    let (coroutine, value) = unsafe {
        let py = Python::assume_attached();
        (Coroutine::from_ptr(py, object), Borrowed::from_ptr(py, value))
    };
    let (status, sent) = match first_step::<B>(&coroutine, &value) {
        Some(Started::Returned(returned)) => (ffi::PySendResult::PYGEN_RETURN, returned.into_value().into_ptr()),
        Some(Started::Raised(_)) => (ffi::PySendResult::PYGEN_ERROR, ptr::null_mut()),
        Some(Started::MustWait(running, needed)) => slow_send::<B>(&coroutine, &value, Some((running, needed))),
        None => slow_send::<B>(&coroutine, &value, None),
    };
    // SAFETY: the interpreter passes a place for the result, and takes over the reference.
    unsafe { *result = sent };
    status
}

/// The first step of a new coroutine.  None: the coroutine is not new, or a value is sent to it.
#[inline(always)]
fn first_step<'a, 'py, B: CoroutineBody>(
    coroutine: &'a Bound<'py, Coroutine>,
    value: &Bound<'py, PyAny>,
) -> Option<Started<'a, 'py>> {
    if !value.is_none() {
        return None;
    }
    Some(B::start(Coroutine::start(coroutine)?))
}

/// Any step but the first one of a coroutine that ends at once.
///
/// It is out of line, so that a coroutine that ends at once neither saves the registers that this function needs nor
/// passes its result through memory.
#[cold]
#[inline(never)]
fn slow_send<'a, 'py, B: CoroutineBody>(
    coroutine: &'a Bound<'py, Coroutine>,
    value: &Bound<'py, PyAny>,
    started: Option<(Running<'a, 'py>, Bound<'py, PyAny>)>,
) -> (ffi::PySendResult, *mut ffi::PyObject) {
    match slow_step::<B>(coroutine, value, started) {
        Ok(SendResult::Returned(returned)) => (ffi::PySendResult::PYGEN_RETURN, returned.into_value().into_ptr()),
        Ok(SendResult::Yielded(yielded)) => (ffi::PySendResult::PYGEN_NEXT, yielded.into_ptr()),
        Err(_) => (ffi::PySendResult::PYGEN_ERROR, ptr::null_mut()),
    }
}

fn slow_step<'a, 'py, B: CoroutineBody>(
    coroutine: &'a Bound<'py, Coroutine>,
    value: &Bound<'py, PyAny>,
    started: Option<(Running<'a, 'py>, Bound<'py, PyAny>)>,
) -> Result<SendResult<'a, 'py>, Raised> {
    catch_panic(|| match started {
        Some((running, needed)) => B::wait(running, needed),
        None => B::resume(coroutine, value),
    })
}

unsafe extern "C" fn iternext<B: CoroutineBody>(object: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls this function with an object of this type, and with the thread attached.  None
    // lives as long as the process.
    let (coroutine, none) = unsafe {
        let py = Python::assume_attached();
        (Coroutine::from_ptr(py, object), Borrowed::from_ptr(py, ffi::Py_None()))
    };
    match first_step::<B>(&coroutine, &none) {
        Some(Started::Returned(returned)) => returned.raise(),
        Some(Started::Raised(_)) => {}
        Some(Started::MustWait(running, needed)) => return slow_next::<B>(&coroutine, &none, Some((running, needed))),
        None => return slow_next::<B>(&coroutine, &none, None),
    }
    ptr::null_mut()
}

/// The same as `slow_send`, for `iternext`.
#[cold]
#[inline(never)]
fn slow_next<'a, 'py, B: CoroutineBody>(
    coroutine: &'a Bound<'py, Coroutine>,
    value: &Bound<'py, PyAny>,
    started: Option<(Running<'a, 'py>, Bound<'py, PyAny>)>,
) -> *mut ffi::PyObject {
    match slow_step::<B>(coroutine, value, started) {
        Ok(SendResult::Returned(returned)) => returned.raise(),
        Ok(SendResult::Yielded(yielded)) => return yielded.into_ptr(),
        Err(_) => {}
    }
    ptr::null_mut()
}

unsafe extern "C" fn send<B: CoroutineBody>(
    object: *mut ffi::PyObject,
    value: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls this function with an object of this type and a value, and with the thread
    // attached.
    let (coroutine, value) = unsafe {
        let py = Python::assume_attached();
        (Coroutine::from_ptr(py, object), Borrowed::from_ptr(py, value))
    };
    into_raw(|| {
        let result = match first_step::<B>(&coroutine, &value) {
            Some(Started::Returned(returned)) => SendResult::Returned(returned),
            Some(Started::Raised(raised)) => return Err(raised),
            Some(Started::MustWait(running, needed)) => B::wait(running, needed)?,
            None => B::resume(&coroutine, &value)?,
        };
        match result {
            SendResult::Yielded(yielded) => Ok(yielded),
            SendResult::Returned(returned) => Err(stop_iteration(returned.into_value()).into()),
        }
    })
}

unsafe extern "C" fn throw<B: CoroutineBody>(
    object: *mut ffi::PyObject,
    arguments: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls this function with an object of this type and a tuple, and with the thread
    // attached.
    let (coroutine, arguments) = unsafe {
        let py = Python::assume_attached();
        let arguments = Borrowed::<PyAny>::from_ptr(py, arguments).cast_unchecked::<PyTuple>();
        (Coroutine::from_ptr(py, object), arguments)
    };
    into_raw(|| Ok(B::throw(&coroutine, &arguments)?))
}

unsafe extern "C" fn close<B: CoroutineBody>(object: *mut ffi::PyObject, _: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls this function with an object of this type, and with the thread attached.
    let coroutine = unsafe { Coroutine::from_ptr(Python::assume_attached(), object) };
    into_raw(|| {
        B::close(&coroutine)?;
        Ok(coroutine.py().None().into_bound(coroutine.py()))
    })
}

/// `closure` is the `Attribute`.
unsafe extern "C" fn get(object: *mut ffi::PyObject, closure: *mut c_void) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls this function with an object of this type and the `closure` from the table of
    // getters, in which every `closure` is an `Attribute`, and with the thread attached.
    let (coroutine, attribute) = unsafe {
        (Coroutine::from_ptr(Python::assume_attached(), object), transmute::<*mut c_void, Attribute>(closure))
    };
    into_raw(|| Ok(attribute(&coroutine)?))
}

unsafe extern "C" fn repr(object: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls this function with the thread attached.
    let py = unsafe { Python::assume_attached() };
    into_raw(|| Ok(format!("<coroutine object db_session at {object:p}>").into_bound_py_any(py)?))
}

unsafe extern "C" fn finalize(object: *mut ffi::PyObject) {
    // SAFETY: the interpreter calls this function with an object of this type, and with the thread attached.
    let coroutine = unsafe { Coroutine::from_ptr(Python::assume_attached(), object) };
    Coroutine::fields(&coroutine).finalized.store(true, Ordering::Relaxed);
    let Some(running) = Coroutine::start(&coroutine) else {
        return;
    };
    drop(running);
    let _ = catch_panic(|| {
        let py = coroutine.py();
        // An exception that is set when the object is deallocated must still be set afterwards.
        let raised = PyErr::take(py);
        let category = py.get_type::<PyRuntimeWarning>();
        if let Err(error) = PyErr::warn(py, &category, c"coroutine 'db_session' was never awaited", 1) {
            error.write_unraisable(py, Some(coroutine.as_any()));
        }
        if let Some(error) = raised {
            error.restore(py);
        }
        Ok(())
    });
}

unsafe extern "C" fn traverse(object: *mut ffi::PyObject, visit: ffi::visitproc, argument: *mut c_void) -> c_int {
    let coroutine: *mut Coroutine = object.cast();
    // SAFETY: the garbage collector calls this function with an object of this type, while no other code changes the
    // object.  Each reference that the object owns, the one to its type included, is visited once.
    unsafe {
        let class = ffi::Py_TYPE(object).cast();
        let connect = (*coroutine).connect.as_ptr();
        let awaited = (*coroutine).awaited.peek().as_ref().map(Object::as_ptr);
        for object in [class, connect].into_iter().chain(awaited) {
            let stop = visit(object, argument);
            if stop != 0 {
                return stop;
            }
        }
    }
    0
}

unsafe extern "C" fn clear(object: *mut ffi::PyObject) -> c_int {
    // SAFETY: the interpreter calls this function with an object of this type, and with the thread attached.
    let coroutine = unsafe { Coroutine::from_ptr(Python::assume_attached(), object) };
    // A coroutine always has a `connect`.
    Coroutine::set_state(&coroutine, State::Done);
    Coroutine::set_awaited(&coroutine, None);
    0
}

unsafe extern "C" fn dealloc(object: *mut ffi::PyObject) {
    let coroutine: *mut Coroutine = object.cast();
    // SAFETY: the interpreter calls this function with the thread attached, and with an object of this type to which
    // there is no reference any more, unless the finalizer creates one.  Each field is moved out and dropped once,
    // before the object becomes a dead one.  A dead object keeps the reference to its type, and a freed one drops it.
    // Without the GIL, a dead object may keep its database too.
    unsafe {
        if (*coroutine).state.load(Ordering::Relaxed) == State::New as u8
            && ffi::PyObject_CallFinalizerFromDealloc(object) < 0
        {
            return;
        }
        let py = Python::assume_attached();
        if (*coroutine).tracked.load(Ordering::Relaxed) {
            ffi::PyObject_GC_UnTrack(object.cast());
            drop((*coroutine).awaited.get_mut().take());
        }
        if !(*coroutine).weakrefs.get().read().is_null() {
            ffi::PyObject_ClearWeakRefs(object);
        }
        kept_connect::keep(coroutine);
        (*coroutine).stop_iteration.recycle(py);
        // The interpreter marks a finalized object, and would never call the finalizer of this object again.
        let finalized = (*coroutine).finalized.load(Ordering::Relaxed);
        if finalized || !FREE_LIST.push(NonNull::new_unchecked(coroutine), py) {
            free(coroutine, py);
        }
    }
}

/// Free a dead coroutine.
///
/// # Safety
/// No other code uses the object.
unsafe fn free(coroutine: *mut Coroutine, py: Python<'_>) {
    // SAFETY: the caller promises that this code alone uses the object, which owns a reference to its type.
    unsafe {
        kept_connect::forget(coroutine);
        (*coroutine).stop_iteration.discard(py);
        let class = ffi::Py_TYPE(coroutine.cast());
        ffi::PyObject_GC_Del(coroutine.cast());
        ffi::Py_DECREF(class.cast());
    }
}

pub use kept_connect::forget_connect;

/// With the GIL, a dead coroutine has no database.
#[cfg(not(Py_GIL_DISABLED))]
mod kept_connect {
    use std::ffi::c_ulong;

    use pyo3::prelude::*;

    use super::{Argument, Coroutine, Object};

    pub unsafe fn init(_: *mut Coroutine) {}

    #[inline(always)]
    pub unsafe fn set(coroutine: *mut Coroutine, connect: Argument<'_, '_>) -> Option<Object> {
        // SAFETY: the object is a `Coroutine` that no other code uses.
        unsafe { (&raw mut (*coroutine).connect).write(connect.to_owned().into()) }
        None
    }

    #[inline(always)]
    pub unsafe fn keep(coroutine: *mut Coroutine) {
        // SAFETY: the coroutine is dying, and its database is moved out once.
        drop(unsafe { (&raw const (*coroutine).connect).read() });
    }

    pub unsafe fn forget(_: *mut Coroutine) {}

    pub fn forget_connect(_: Python<'_>, _: c_ulong) {}
}

/// Without the GIL, all threads would contend for the reference count of a database, which they share.  Therefore a dead
/// coroutine in the free list keeps its reference, and the next coroutine of the thread takes over the reference if it
/// is of the same database.
///
/// Only a coroutine that has returned a session keeps the reference: the context of the thread has one as well.  When
/// the context drops its reference, it calls `forget_connect`.
#[cfg(Py_GIL_DISABLED)]
mod kept_connect {
    use std::ffi::c_ulong;
    use std::sync::atomic::Ordering;

    use pyo3::prelude::*;

    use super::{Argument, Coroutine, FREE_LIST, Object, free};

    /// The field `connect` of a dead coroutine.
    ///
    /// An `Object` is a pointer that is not null, and None is the null pointer: both types have the same layout.
    ///
    /// # Safety
    /// The pointer is to memory of the size of a `Coroutine`.
    unsafe fn field(coroutine: *mut Coroutine) -> *mut Option<Object> {
        const { assert!(size_of::<Option<Object>>() == size_of::<Object>()) }
        // SAFETY: the caller promises the same.
        unsafe { (&raw mut (*coroutine).connect).cast() }
    }

    /// # Safety
    /// The object is a new `Coroutine` that no other code uses.
    pub unsafe fn init(coroutine: *mut Coroutine) {
        // SAFETY: the caller promises the same.
        unsafe { field(coroutine).write(None) }
    }

    /// Set the database, and return the kept reference if it is to another object.
    ///
    /// # Safety
    /// The object is a dead or new `Coroutine` that no other code uses.
    #[inline(always)]
    pub unsafe fn set(coroutine: *mut Coroutine, connect: Argument<'_, '_>) -> Option<Object> {
        // SAFETY: the caller promises the same.
        let kept = unsafe { &mut *field(coroutine) };
        match kept {
            Some(kept) if kept.is(connect) => None,
            _ => kept.replace(connect.to_owned().into()),
        }
    }

    /// Drop the reference, unless the next coroutine may use it.
    ///
    /// # Safety
    /// The coroutine is dying: no other code uses it.
    #[inline(always)]
    pub unsafe fn keep(coroutine: *mut Coroutine) {
        // SAFETY: the caller promises the same.
        unsafe {
            if !(*coroutine).returned.load(Ordering::Relaxed) {
                forget(coroutine);
            }
        }
    }

    /// Drop the kept reference, if there is one.
    ///
    /// # Safety
    /// The object is a dead or dying `Coroutine` that no other code uses.
    pub unsafe fn forget(coroutine: *mut Coroutine) {
        // SAFETY: the caller promises the same.  The reference is moved out, and dropped afterwards.
        drop(unsafe { (*field(coroutine)).take() });
    }

    /// Drop the reference that the dead coroutine of the thread with this number keeps.
    #[cold]
    pub fn forget_connect(py: Python<'_>, thread: c_ulong) {
        let thread = thread as usize;
        if let Some(coroutine) = FREE_LIST.take(thread) {
            // SAFETY: the list contains dead coroutines, and this thread alone has this one.
            unsafe {
                forget(coroutine.as_ptr());
                if !FREE_LIST.give(thread, coroutine) {
                    free(coroutine.as_ptr(), py);
                }
            }
        }
    }
}
