//! Functions whose every detail that a caller can look at is their Python twin's, and whose body is Rust.

use std::ffi::{CStr, c_int, c_void};
use std::mem::offset_of;
use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;
use pyo3::{Borrowed, IntoPyObjectExt, intern};

use super::{Argument, Immortal, NO_GETTER, NO_MEMBER, Outcome, immortalize, member, new_type, returned, slot};

/// The body of a function with `N` parameters.
pub trait Body<const N: usize> {
    const PARAMETERS: [&'static CStr; N];
    /// How many must be passed.  The others are False by default, the only default there is.
    const REQUIRED: usize = N;
    /// Whether a panic becomes an exception.  That takes a tenth of the time of a lookup: where nothing
    /// can panic, or only what is guarded itself, there is no need.
    const GUARDED: bool = true;

    fn call<'py>(py: Python<'py>, arguments: [Argument<'_, 'py>; N]) -> Outcome<'py>;
}

#[repr(C)]
struct Function {
    ob_base: ffi::PyObject,
    vectorcall: ffi::vectorcallfunc,
    /// The function in Python: it words the error for arguments that do not fit.
    twin: *mut ffi::PyObject,
    dict: *mut ffi::PyObject,
    weakrefs: *mut ffi::PyObject,
}

/// What a function has.
const ATTRIBUTES: &[&str] = &[
    "__name__",
    "__qualname__",
    "__doc__",
    "__code__",
    "__globals__",
    "__builtins__",
    "__closure__",
    "__defaults__",
    "__kwdefaults__",
    "__annotations__",
    #[cfg(Py_3_12)]
    "__type_params__",
];

static TYPE: Immortal<ffi::PyTypeObject> = Immortal::new();

/// Make the function whose body is `B` and which is like `twin` in everything else.
pub fn function<'py, const N: usize, B: Body<N>>(twin: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = twin.py();
    if TYPE.get().is_null() {
        TYPE.set(function_type(py)?);
    }
    // SAFETY: the type is a `Function`'s; every field is set before anyone else sees the object.
    let function = unsafe {
        let function = ffi::PyObject_GC_New::<Function>(TYPE.get());
        if function.is_null() {
            return Err(PyErr::fetch(py));
        }
        (*function).vectorcall = vectorcall::<N, B>;
        (*function).twin = twin.clone().into_ptr();
        (*function).dict = PyDict::new(py).into_ptr().cast();
        (*function).weakrefs = ptr::null_mut();
        ffi::PyObject_GC_Track(function.cast());
        Bound::from_owned_ptr(py, function.cast())
    };
    for name in ATTRIBUTES {
        function.setattr(name, twin.getattr(name)?)?;
    }
    // Where both backends' users find it, and where pickle looks for it.
    function.setattr("__module__", "ctxalchemy")?;
    immortalize(&function);
    Ok(function)
}

fn function_type(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    static mut METHODS: [ffi::PyMethodDef; 2] = [
        ffi::PyMethodDef {
            ml_name: c"__reduce__".as_ptr(),
            ml_meth: ffi::PyMethodDefPointer { PyCFunction: reduce },
            ml_flags: ffi::METH_NOARGS,
            ml_doc: ptr::null(),
        },
        ffi::PyMethodDef::zeroed(),
    ];
    static mut GETTERS: [ffi::PyGetSetDef; 3] = [
        ffi::PyGetSetDef {
            name: c"__class__".as_ptr(),
            get: Some(class),
            set: None,
            doc: ptr::null(),
            closure: ptr::null_mut(),
        },
        ffi::PyGetSetDef {
            name: c"__dict__".as_ptr(),
            get: Some(ffi::PyObject_GenericGetDict),
            set: Some(ffi::PyObject_GenericSetDict),
            doc: ptr::null(),
            closure: ptr::null_mut(),
        },
        NO_GETTER,
    ];
    static mut MEMBERS: [ffi::PyMemberDef; 4] = [
        member(c"__vectorcalloffset__", offset_of!(Function, vectorcall)),
        member(c"__dictoffset__", offset_of!(Function, dict)),
        member(c"__weaklistoffset__", offset_of!(Function, weakrefs)),
        NO_MEMBER,
    ];
    new_type(
        py,
        c"ctxalchemy._native.function",
        size_of::<Function>(),
        ffi::Py_TPFLAGS_HAVE_VECTORCALL | ffi::Py_TPFLAGS_METHOD_DESCRIPTOR | ffi::Py_TPFLAGS_DISALLOW_INSTANTIATION,
        &mut [
            slot(ffi::Py_tp_call, ffi::PyVectorcall_Call as *const c_void),
            slot(ffi::Py_tp_descr_get, descr_get as *const c_void),
            slot(ffi::Py_tp_repr, repr as *const c_void),
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

unsafe extern "C" fn vectorcall<const N: usize, B: Body<N>>(
    function: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    nargsf: usize,
    names: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    let passed = nargsf & !ffi::PY_VECTORCALL_ARGUMENTS_OFFSET;
    // SAFETY: this is the vectorcall protocol: the thread is attached, there are `passed` arguments
    // and then one for each of `names`, all alive during the call, and `function` is a `Function`.
    unsafe {
        let py = Python::assume_attached();
        let bound = if names.is_null() && passed == N {
            std::array::from_fn(|index| *arguments.add(index))
        } else {
            match bind::<N, B>(arguments, passed, names) {
                Some(bound) => bound,
                None => return ffi::PyObject_Vectorcall((*function.cast::<Function>()).twin, arguments, nargsf, names),
            }
        };
        let arguments = bound.map(|argument| Borrowed::from_ptr(py, argument));
        if B::GUARDED {
            returned(|| B::call(py, arguments))
        } else {
            B::call(py, arguments).map_or(ptr::null_mut(), Bound::into_ptr)
        }
    }
}

/// Find the argument for each parameter.  None: they do not fit.
///
/// # Safety
/// As for vectorcall.
#[inline(always)]
unsafe fn bind<const N: usize, B: Body<N>>(
    arguments: *const *mut ffi::PyObject,
    passed: usize,
    names: *mut ffi::PyObject,
) -> Option<[*mut ffi::PyObject; N]> {
    let mut bound = [ptr::null_mut(); N];
    // SAFETY: `passed` arguments are there.
    unsafe {
        for (index, place) in bound.get_mut(..passed)?.iter_mut().enumerate() {
            *place = *arguments.add(index);
        }
        if !names.is_null() {
            bind_names::<N, B>(&mut bound, arguments.add(passed), names)?;
        }
    }
    for (index, place) in bound.iter_mut().enumerate().filter(|(_, place)| place.is_null()) {
        if index < B::REQUIRED {
            return None;
        }
        // SAFETY: it lives forever.
        *place = unsafe { ffi::Py_False() };
    }
    Some(bound)
}

/// Set the parameters that are passed by name.  None: they do not fit.
///
/// # Safety
/// `names` is a tuple of strings, and `named` the argument for each.
unsafe fn bind_names<const N: usize, B: Body<N>>(
    bound: &mut [*mut ffi::PyObject; N],
    named: *const *mut ffi::PyObject,
    names: *mut ffi::PyObject,
) -> Option<()> {
    // SAFETY: as above.
    unsafe {
        for index in 0..ffi::PyTuple_GET_SIZE(names) {
            let name = ffi::PyTuple_GET_ITEM(names, index);
            let is_name = |each: &&CStr| ffi::PyUnicode_CompareWithASCIIString(name, each.as_ptr()) == 0;
            let place = &mut bound[B::PARAMETERS.iter().position(is_name)?];
            if !place.is_null() {
                return None;
            }
            *place = *named.add(index as usize);
        }
    }
    Some(())
}

unsafe extern "C" fn descr_get(
    function: *mut ffi::PyObject,
    object: *mut ffi::PyObject,
    _type: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    static METHOD: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    // SAFETY: called by the interpreter with an object of this type, and an object or null.
    let (py, function, object) = unsafe {
        let py = Python::assume_attached();
        (py, Borrowed::<PyAny>::from_ptr(py, function), Borrowed::<PyAny>::from_ptr_or_opt(py, object))
    };
    returned(|| match object {
        Some(object) => Ok(METHOD.import(py, "types", "MethodType")?.call1((function, object))?),
        None => Ok(function.to_owned()),
    })
}

/// `isinstance(..., types.FunctionType)` and `inspect.isfunction` say yes.
unsafe extern "C" fn class(_function: *mut ffi::PyObject, _: *mut c_void) -> *mut ffi::PyObject {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    // SAFETY: called by the interpreter.
    let py = unsafe { Python::assume_attached() };
    returned(|| Ok(CLASS.import(py, "types", "FunctionType")?.clone()))
}

unsafe extern "C" fn repr(function: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: called by the interpreter with an object of this type.
    let (py, function) = unsafe {
        let py = Python::assume_attached();
        (py, Borrowed::<PyAny>::from_ptr(py, function))
    };
    returned(|| {
        let name = function.getattr(intern!(py, "__qualname__"))?;
        Ok(format!("<function {name} at {:p}>", function.as_ptr()).into_bound_py_any(py)?)
    })
}

unsafe extern "C" fn reduce(function: *mut ffi::PyObject, _: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: called by the interpreter with an object of this type.
    let (py, function) = unsafe {
        let py = Python::assume_attached();
        (py, Borrowed::<PyAny>::from_ptr(py, function))
    };
    // A string: to be found by that name in `__module__`.
    returned(|| Ok(function.getattr(intern!(py, "__qualname__"))?))
}

unsafe extern "C" fn traverse(function: *mut ffi::PyObject, visit: ffi::visitproc, argument: *mut c_void) -> c_int {
    // SAFETY: called by the garbage collector with an object of this type; each reference is visited once.
    unsafe {
        let fields = &*function.cast::<Function>();
        for object in [ffi::Py_TYPE(function).cast(), fields.twin, fields.dict] {
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

unsafe extern "C" fn clear(function: *mut ffi::PyObject) -> c_int {
    let function: *mut Function = function.cast();
    // SAFETY: called with an object of this type.  `twin` stays: the function may still be called.
    unsafe { ffi::Py_CLEAR(&raw mut (*function).dict) };
    0
}

unsafe extern "C" fn dealloc(object: *mut ffi::PyObject) {
    let function: *mut Function = object.cast();
    // SAFETY: nobody else has the object any more; it owns these references, and one to its type.
    unsafe {
        ffi::PyObject_GC_UnTrack(object.cast());
        if !(*function).weakrefs.is_null() {
            ffi::PyObject_ClearWeakRefs(object);
        }
        ffi::Py_CLEAR(&raw mut (*function).dict);
        ffi::Py_CLEAR(&raw mut (*function).twin);
        let class = ffi::Py_TYPE(object);
        ffi::PyObject_GC_Del(object.cast());
        ffi::Py_DECREF(class.cast());
    }
}
