//! What `db_session()` returns: to every caller, the coroutine of an `async def`.

use std::ffi::{CStr, c_int, c_void};
use std::mem::{offset_of, transmute};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};

use pyo3::exceptions::PyRuntimeWarning;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::critical_section::with_critical_section;
use pyo3::types::PyTuple;
use pyo3::{Borrowed, IntoPyObjectExt};

use super::pool::Pool;
use super::stop_iteration::{Spare, stop_iteration};
use super::{Argument, Immortal, NO_GETTER, NO_MEMBER, Outcome, Raised, caught, member, new_type, returned, slot};
use crate::coroutine;

#[repr(C)]
pub struct Coroutine {
    ob_base: ffi::PyObject,
    connect: NonNull<ffi::PyObject>,
    /// The coroutine of `create_session` while there is one; of whoever set the state to `Running`.
    inner: *mut ffi::PyObject,
    stop: Spare,
    weakrefs: *mut ffi::PyObject,
    state: AtomicU8,
    tracked: bool,
    finalized: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Nobody has awaited it.
    New,
    /// Someone is inside it right now.
    Running,
    /// It waits for `create_session`.
    Suspended,
    Done,
}

/// What came of a `send()`.
pub enum Sent<'py> {
    Yielded(Bound<'py, PyAny>),
    Returned(Bound<'py, PyAny>),
}

static TYPE: Immortal<ffi::PyTypeObject> = Immortal::new();

static POOL: Pool<Coroutine> = Pool::new();

impl Coroutine {
    pub fn install(py: Python<'_>) -> PyResult<()> {
        TYPE.set(coroutine_type(py)?);
        Ok(())
    }

    #[inline(always)]
    pub fn object<'py>(connect: Argument<'_, 'py>) -> Outcome<'py> {
        let py = connect.py();
        // SAFETY: the object, from the pool or new, is a `Coroutine`; each field that the pool does
        // not keep is set before anyone else sees it.  The collector does not see it before it is tracked.
        unsafe {
            let coroutine = match POOL.take() {
                Some(coroutine) => coroutine.as_ptr(),
                None => {
                    let coroutine = ffi::PyObject_GC_New::<Coroutine>(TYPE.get());
                    if coroutine.is_null() {
                        return Err(Raised);
                    }
                    (&raw mut (*coroutine).stop).write(Spare::new());
                    coroutine
                }
            };
            (*coroutine).connect = NonNull::new_unchecked(connect.to_owned().into_ptr());
            (*coroutine).inner = ptr::null_mut();
            (*coroutine).weakrefs = ptr::null_mut();
            (&raw mut (*coroutine).state).write(AtomicU8::new(State::New as u8));
            (*coroutine).tracked = false;
            (*coroutine).finalized = false;
            Ok(Bound::from_owned_ptr(py, coroutine.cast()))
        }
    }

    /// # Safety
    /// `object` is a `Coroutine`, and not freed within the lifetime.
    #[inline(always)]
    unsafe fn of<'a>(object: *mut ffi::PyObject) -> &'a Self {
        // SAFETY: as above.  What changes behind the reference is only touched through raw pointers.
        unsafe { &*object.cast() }
    }

    fn as_ptr(&self) -> *mut Self {
        ptr::from_ref(self).cast_mut()
    }

    #[inline(always)]
    pub fn connect<'a, 'py>(&'a self, py: Python<'py>) -> Argument<'a, 'py> {
        // SAFETY: set at birth, and until death.
        unsafe { Borrowed::from_ptr(py, self.connect.as_ptr()) }
    }

    #[inline(always)]
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            0 => State::New,
            1 => State::Running,
            2 => State::Suspended,
            _ => State::Done,
        }
    }

    /// Become the one who runs it, if its state is `from`.
    #[inline(always)]
    pub fn claim(&self, from: State) -> bool {
        if cfg!(Py_GIL_DISABLED) {
            let (from, to) = (from as u8, State::Running as u8);
            self.state.compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed).is_ok()
        } else {
            let free = self.state() == from;
            if free {
                self.state.store(State::Running as u8, Ordering::Relaxed);
            }
            free
        }
    }

    /// Stop running it.
    #[inline(always)]
    pub fn release(&self, to: State) {
        self.state.store(to as u8, Ordering::Release);
    }

    /// What it waits for, once there is something.
    pub fn inner<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        with_critical_section(&self.borrowed(py), || {
            // SAFETY: null or an object that this one owns; it changes under the same lock.
            unsafe { Bound::from_borrowed_ptr_or_opt(py, (*self.as_ptr()).inner) }
        })
    }

    /// Set what it waits for, once.
    pub fn set_inner(&self, inner: &Bound<'_, PyAny>) {
        let this = self.borrowed(inner.py());
        with_critical_section(&this, || {
            // SAFETY: the object is complete, there was none before, and the caller is the one who runs it.
            unsafe {
                (*self.as_ptr()).inner = inner.clone().into_ptr();
                // From now on it can be part of a cycle: a task that waits for what it is itself to do.
                (*self.as_ptr()).tracked = true;
                ffi::PyObject_GC_Track(this.as_ptr().cast());
            }
        });
    }

    /// Send a value into what it waits for.
    pub fn send_inner<'py>(inner: &Bound<'py, PyAny>, value: &Bound<'py, PyAny>) -> PyResult<Sent<'py>> {
        let py = inner.py();
        let mut result = ptr::null_mut();
        // SAFETY: both are objects; the result is owned unless it is an error.
        unsafe {
            match ffi::PyIter_Send(inner.as_ptr(), value.as_ptr(), &mut result) {
                ffi::PySendResult::PYGEN_RETURN => Ok(Sent::Returned(Bound::from_owned_ptr(py, result))),
                ffi::PySendResult::PYGEN_NEXT => Ok(Sent::Yielded(Bound::from_owned_ptr(py, result))),
                ffi::PySendResult::PYGEN_ERROR => Err(PyErr::fetch(py)),
            }
        }
    }

    fn borrowed<'a, 'py>(&'a self, py: Python<'py>) -> Borrowed<'a, 'py, PyAny> {
        // SAFETY: every `Coroutine` is an object.
        unsafe { Borrowed::from_ptr(py, self.as_ptr().cast()) }
    }
}

fn coroutine_type(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    const fn method(
        name: &'static CStr,
        function: ffi::PyMethodDefPointer,
        flags: c_int,
        doc: &'static CStr,
    ) -> ffi::PyMethodDef {
        ffi::PyMethodDef { ml_name: name.as_ptr(), ml_meth: function, ml_flags: flags, ml_doc: doc.as_ptr() }
    }
    const fn getter(name: &'static CStr, attribute: Attribute) -> ffi::PyGetSetDef {
        ffi::PyGetSetDef {
            name: name.as_ptr(),
            get: Some(get),
            set: None,
            doc: ptr::null(),
            closure: attribute as *mut c_void,
        }
    }
    static mut METHODS: [ffi::PyMethodDef; 4] = [
        method(
            c"send",
            ffi::PyMethodDefPointer { PyCFunction: send },
            ffi::METH_O,
            c"send($self, arg, /)\n--\n\nSend a value into the coroutine; return what it yields, or raise StopIteration.",
        ),
        method(
            c"throw",
            ffi::PyMethodDefPointer { PyCFunction: throw },
            ffi::METH_VARARGS,
            c"Raise an exception inside the coroutine; return what it yields, or raise StopIteration.",
        ),
        method(
            c"close",
            ffi::PyMethodDefPointer { PyCFunction: close },
            ffi::METH_NOARGS,
            c"close($self, /)\n--\n\nRaise GeneratorExit inside the coroutine.",
        ),
        ffi::PyMethodDef::zeroed(),
    ];
    static mut GETTERS: [ffi::PyGetSetDef; 11] = [
        getter(c"__name__", coroutine::name),
        getter(c"__qualname__", coroutine::name),
        getter(c"__class__", coroutine::class),
        getter(c"cr_running", coroutine::is_running),
        getter(c"cr_suspended", coroutine::is_suspended),
        getter(c"cr_state", coroutine::state),
        getter(c"cr_await", coroutine::awaited),
        getter(c"cr_frame", coroutine::frame),
        getter(c"cr_code", coroutine::code),
        getter(c"cr_origin", coroutine::origin),
        NO_GETTER,
    ];
    static mut MEMBERS: [ffi::PyMemberDef; 2] =
        [member(c"__weaklistoffset__", offset_of!(Coroutine, weakrefs)), NO_MEMBER];
    new_type(
        py,
        c"ctxalchemy._native.coroutine",
        size_of::<Coroutine>(),
        ffi::Py_TPFLAGS_DISALLOW_INSTANTIATION | ffi::Py_TPFLAGS_IMMUTABLETYPE,
        &mut [
            slot(ffi::Py_am_await, am_await as *const c_void),
            slot(ffi::Py_am_send, am_send as *const c_void),
            slot(ffi::Py_tp_iter, ffi::PyObject_SelfIter as *const c_void),
            slot(ffi::Py_tp_iternext, iternext as *const c_void),
            slot(ffi::Py_tp_repr, repr as *const c_void),
            slot(ffi::Py_tp_finalize, finalize as *const c_void),
            slot(ffi::Py_tp_traverse, traverse as *const c_void),
            slot(ffi::Py_tp_clear, clear as *const c_void),
            slot(ffi::Py_tp_dealloc, dealloc as *const c_void),
            slot(ffi::Py_tp_methods, &raw const METHODS),
            slot(ffi::Py_tp_getset, &raw const GETTERS),
            slot(ffi::Py_tp_members, &raw const MEMBERS),
            slot::<c_void>(0, ptr::null()),
        ],
    )
}

unsafe extern "C" fn am_await(object: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: called by the interpreter with an object of this type.
    unsafe {
        if Coroutine::of(object).state() == State::Suspended {
            return returned(|| Err(coroutine::awaited_already().into()));
        }
        ffi::Py_NewRef(object)
    }
}

unsafe extern "C" fn am_send(
    object: *mut ffi::PyObject,
    value: *mut ffi::PyObject,
    result: *mut *mut ffi::PyObject,
) -> ffi::PySendResult {
    // SAFETY: called by the interpreter with an object of this type and a value; the result is given away.
    unsafe {
        let py = Python::assume_attached();
        let value = Borrowed::from_ptr(py, value);
        let (outcome, sent) = match coroutine::send(Coroutine::of(object), &value) {
            Ok(Sent::Returned(session)) => (ffi::PySendResult::PYGEN_RETURN, session.into_ptr()),
            Ok(Sent::Yielded(future)) => (ffi::PySendResult::PYGEN_NEXT, future.into_ptr()),
            Err(Raised) => (ffi::PySendResult::PYGEN_ERROR, ptr::null_mut()),
        };
        *result = sent;
        outcome
    }
}

unsafe extern "C" fn iternext(object: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: called by the interpreter with an object of this type.
    unsafe {
        let py = Python::assume_attached();
        let none = Borrowed::from_ptr(py, ffi::Py_None());
        match coroutine::send(Coroutine::of(object), &none) {
            Ok(Sent::Returned(session)) => (*object.cast::<Coroutine>()).stop.raise(session),
            Ok(Sent::Yielded(future)) => return future.into_ptr(),
            Err(Raised) => {}
        }
    }
    ptr::null_mut()
}

unsafe extern "C" fn send(object: *mut ffi::PyObject, value: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: called by the interpreter with an object of this type and a value.
    let (this, value) = unsafe {
        let py = Python::assume_attached();
        (Coroutine::of(object), Borrowed::from_ptr(py, value))
    };
    returned(|| match coroutine::send(this, &value)? {
        Sent::Yielded(future) => Ok(future),
        Sent::Returned(session) => Err(stop_iteration(session).into()),
    })
}

unsafe extern "C" fn throw(object: *mut ffi::PyObject, arguments: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: called by the interpreter with an object of this type and a tuple.
    let (this, arguments) = unsafe {
        let py = Python::assume_attached();
        let arguments = Borrowed::<PyAny>::from_ptr(py, arguments).cast_unchecked::<PyTuple>();
        (Coroutine::of(object), arguments)
    };
    returned(|| Ok(coroutine::throw(this, &arguments)?))
}

unsafe extern "C" fn close(object: *mut ffi::PyObject, _: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: called by the interpreter with an object of this type.
    let (py, this) = unsafe { (Python::assume_attached(), Coroutine::of(object)) };
    returned(|| Ok(coroutine::close(py, this)?))
}

type Attribute = for<'py> fn(Python<'py>, &Coroutine) -> PyResult<Bound<'py, PyAny>>;

/// `closure` is the `Attribute`.
unsafe extern "C" fn get(object: *mut ffi::PyObject, closure: *mut c_void) -> *mut ffi::PyObject {
    // SAFETY: called by the interpreter with an object of this type, and what the table says.
    let (py, coroutine, attribute) =
        unsafe { (Python::assume_attached(), Coroutine::of(object), transmute::<*mut c_void, Attribute>(closure)) };
    returned(|| Ok(attribute(py, coroutine)?))
}

unsafe extern "C" fn repr(object: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: called by the interpreter.
    let py = unsafe { Python::assume_attached() };
    returned(|| Ok(format!("<coroutine object db_session at {object:p}>").into_bound_py_any(py)?))
}

unsafe extern "C" fn finalize(object: *mut ffi::PyObject) {
    // SAFETY: called by the interpreter with an object of this type.
    let (py, coroutine) = unsafe { (Python::assume_attached(), Coroutine::of(object)) };
    // SAFETY: nobody else has the object.
    unsafe { (*object.cast::<Coroutine>()).finalized = true };
    if !coroutine.claim(State::New) {
        return;
    }
    coroutine.release(State::Done);
    let _ = caught(|| {
        // Whatever is being raised while the object goes stays so.
        let raised = PyErr::take(py);
        let category = py.get_type::<PyRuntimeWarning>();
        if let Err(error) = PyErr::warn(py, &category, c"coroutine 'db_session' was never awaited", 1) {
            error.write_unraisable(py, Some(&coroutine.borrowed(py)));
        }
        if let Some(error) = raised {
            error.restore(py);
        }
        Ok(())
    });
}

unsafe extern "C" fn traverse(object: *mut ffi::PyObject, visit: ffi::visitproc, argument: *mut c_void) -> c_int {
    // SAFETY: called by the garbage collector with an object of this type; each reference is visited once.
    unsafe {
        let fields = Coroutine::of(object);
        for object in [ffi::Py_TYPE(object).cast(), fields.connect.as_ptr(), fields.inner] {
            if !object.is_null() {
                let stop = visit(object, argument);
                if stop != 0 {
                    return stop;
                }
            }
        }
    }
    0
}

unsafe extern "C" fn clear(object: *mut ffi::PyObject) -> c_int {
    // SAFETY: called with an object of this type, by an attached thread.
    let (py, coroutine) = unsafe { (Python::assume_attached(), Coroutine::of(object)) };
    // `connect` stays, so that there always is one.
    coroutine.release(State::Done);
    let inner = with_critical_section(&coroutine.borrowed(py), || {
        // SAFETY: as above; null or owned.
        unsafe {
            let inner = ptr::replace(&raw mut (*coroutine.as_ptr()).inner, ptr::null_mut());
            Bound::from_owned_ptr_or_opt(py, inner)
        }
    });
    drop(inner);
    0
}

unsafe extern "C" fn dealloc(object: *mut ffi::PyObject) {
    let coroutine: *mut Coroutine = object.cast();
    // SAFETY: nobody else has the object any more, unless its finalizer gives it to someone.  It
    // owns what its fields point to, and one reference to its type, which it takes into the pool.
    unsafe {
        if (*coroutine).state.load(Ordering::Relaxed) == State::New as u8
            && ffi::PyObject_CallFinalizerFromDealloc(object) < 0
        {
            return;
        }
        if (*coroutine).tracked {
            ffi::PyObject_GC_UnTrack(object.cast());
            ffi::Py_CLEAR(&raw mut (*coroutine).inner);
        }
        if !(*coroutine).weakrefs.is_null() {
            ffi::PyObject_ClearWeakRefs(object);
        }
        ffi::Py_DECREF((*coroutine).connect.as_ptr());
        (*coroutine).stop.recycle();
        // The interpreter remembers of a finalized one that it is, and would not do it again.
        if (*coroutine).finalized || !POOL.put(NonNull::new_unchecked(coroutine)) {
            (*coroutine).stop.discard();
            let class = ffi::Py_TYPE(object);
            ffi::PyObject_GC_Del(object.cast());
            ffi::Py_DECREF(class.cast());
        }
    }
}
