//! Python functions whose body is Rust.  All their attributes are those of a function of the reference implementation.

use std::ffi::{CStr, c_int, c_void};
use std::mem::offset_of;
use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;
use pyo3::{Borrowed, IntoPyObjectExt, intern};

use super::immortal::{Immortal, share};
use super::outcome::{Argument, Outcome, into_raw};
use super::types::{NO_GETTER, NO_MEMBER, NO_METHOD, getter, method, new_type, offset, slot, table};

/// The body of a function with `N` parameters.
pub trait Body<const N: usize> {
    /// The names of the parameters.
    const PARAMETERS: [&'static CStr; N];
    /// How many arguments must be passed.  The default of the other parameters is False.
    const REQUIRED: usize = N;
    /// Whether a panic becomes an exception.  Otherwise a panic aborts the process.
    ///
    /// The conversion takes a tenth of the time of a lookup.  A body does not need the conversion if the body cannot
    /// panic, or calls `catch_panic` around the code that can panic.
    const GUARDED: bool = true;

    /// Run the body.
    fn call<'py>(py: Python<'py>, arguments: [Argument<'_, 'py>; N]) -> Outcome<'py>;
}

/// A function, in the memory layout of a Python object.
///
/// There is no reference to a whole `Function` in Rust, because the interpreter changes its header at any time.
#[repr(C)]
struct Function {
    ob_base: ffi::PyObject,
    vectorcall: ffi::vectorcallfunc,
    /// The function of the reference implementation.  It raises the error for arguments that do not fit.
    reference: *mut ffi::PyObject,
    dict: *mut ffi::PyObject,
    weakrefs: *mut ffi::PyObject,
}

/// The attributes that a function copies from its reference.
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

/// Create the function whose body is `B`, and whose attributes are those of `reference`.
pub fn function<'py, const N: usize, B: Body<N>>(reference: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = reference.py();
    if TYPE.as_ptr().is_null() {
        // SAFETY: the objects of the type are of the size of a `Function`.  The type is new.
        unsafe { TYPE.set(new_function_type(py)?) };
    }
    let Ok(class) = TYPE.get() else {
        return Err(PyErr::fetch(py));
    };
    // SAFETY: the objects of this type are as large as a `Function`.  Every field is set before other code uses the
    // object.
    let function = unsafe {
        let function = ffi::PyObject_GC_New::<Function>(class.as_ptr());
        if function.is_null() {
            return Err(PyErr::fetch(py));
        }
        (&raw mut (*function).vectorcall).write(vectorcall::<N, B>);
        (&raw mut (*function).reference).write(reference.clone().into_ptr());
        (&raw mut (*function).dict).write(PyDict::new(py).into_ptr());
        (&raw mut (*function).weakrefs).write(ptr::null_mut());
        Bound::from_owned_ptr(py, function.cast())
    };
    for name in ATTRIBUTES {
        function.setattr(name, reference.getattr(name)?)?;
    }
    // Users of either backend find the function in this module, and `pickle` does so too.
    function.setattr("__module__", "ctxalchemy")?;
    // SAFETY: this thread has created the object, and no other thread uses it yet.  Every field is set.
    unsafe {
        ffi::PyObject_GC_Track(function.as_ptr().cast());
        share(&function);
    }
    Ok(function)
}

fn new_function_type(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    let methods = table(vec![
        method(c"__reduce__", ffi::PyMethodDefPointer { PyCFunction: reduce }, ffi::METH_NOARGS, None),
        NO_METHOD,
    ]);
    let getters = table(vec![
        getter(c"__class__", class, ptr::null_mut()),
        ffi::PyGetSetDef {
            set: Some(ffi::PyObject_GenericSetDict),
            ..getter(c"__dict__", ffi::PyObject_GenericGetDict, ptr::null_mut())
        },
        NO_GETTER,
    ]);
    let members = table(vec![
        offset(c"__vectorcalloffset__", offset_of!(Function, vectorcall)),
        offset(c"__dictoffset__", offset_of!(Function, dict)),
        offset(c"__weaklistoffset__", offset_of!(Function, weakrefs)),
        NO_MEMBER,
    ]);
    // SAFETY: the functions are for objects of this type, and each table ends with its end entry.
    unsafe {
        new_type(
            py,
            c"ctxalchemy._native.function",
            size_of::<Function>(),
            ffi::Py_TPFLAGS_HAVE_VECTORCALL
                | ffi::Py_TPFLAGS_METHOD_DESCRIPTOR
                | ffi::Py_TPFLAGS_DISALLOW_INSTANTIATION,
            &[
                slot(ffi::Py_tp_call, ffi::PyVectorcall_Call as *const c_void),
                slot(ffi::Py_tp_descr_get, descr_get as *const c_void),
                slot(ffi::Py_tp_repr, repr as *const c_void),
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

unsafe extern "C" fn vectorcall<const N: usize, B: Body<N>>(
    function: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    nargsf: usize,
    names: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    let passed = nargsf & !ffi::PY_VECTORCALL_ARGUMENTS_OFFSET;
    // SAFETY: the interpreter calls this function by the vectorcall protocol.  The thread is attached, and `function`
    // is a `Function`.  There are `passed` arguments, and then one for each of `names`.  All are alive during the call.
    unsafe {
        let py = Python::assume_attached();
        let bound = if names.is_null() && passed == N {
            std::array::from_fn(|index| *arguments.add(index))
        } else {
            match bind_arguments::<N, B>(arguments, passed, names) {
                Some(bound) => bound,
                None => {
                    let reference = (*function.cast::<Function>()).reference;
                    return ffi::PyObject_Vectorcall(reference, arguments, nargsf, names);
                }
            }
        };
        let arguments = bound.map(|argument| Borrowed::from_ptr(py, argument));
        if B::GUARDED {
            into_raw(|| B::call(py, arguments))
        } else {
            B::call(py, arguments).map_or(ptr::null_mut(), Bound::into_ptr)
        }
    }
}

/// The argument for each parameter, or None if the arguments do not fit.
///
/// # Safety
/// `arguments` has `passed` arguments, and then one for each string in `names`, which is null or a tuple of strings.
#[inline(always)]
unsafe fn bind_arguments<const N: usize, B: Body<N>>(
    arguments: *const *mut ffi::PyObject,
    passed: usize,
    names: *mut ffi::PyObject,
) -> Option<[*mut ffi::PyObject; N]> {
    let mut bound = [ptr::null_mut(); N];
    // SAFETY: the caller promises the same.
    unsafe {
        for (index, parameter) in bound.get_mut(..passed)?.iter_mut().enumerate() {
            *parameter = *arguments.add(index);
        }
        if !names.is_null() {
            bind_names::<N, B>(&mut bound, arguments.add(passed), names)?;
        }
    }
    for (index, parameter) in bound.iter_mut().enumerate().filter(|(_, parameter)| parameter.is_null()) {
        if index < B::REQUIRED {
            return None;
        }
        // SAFETY: False is an object that lives as long as the process.
        *parameter = unsafe { ffi::Py_False() };
    }
    Some(bound)
}

/// Set the parameters that are passed by name.  The result is None if the arguments do not fit.
///
/// # Safety
/// `names` is a tuple of strings, and `named` has one argument for each string.
unsafe fn bind_names<const N: usize, B: Body<N>>(
    bound: &mut [*mut ffi::PyObject; N],
    named: *const *mut ffi::PyObject,
    names: *mut ffi::PyObject,
) -> Option<()> {
    // SAFETY: the caller promises the same.
    unsafe {
        for index in 0..ffi::PyTuple_GET_SIZE(names) {
            let name = ffi::PyTuple_GET_ITEM(names, index);
            let is_name = |each: &&CStr| ffi::PyUnicode_CompareWithASCIIString(name, each.as_ptr()) == 0;
            let parameter = &mut bound[B::PARAMETERS.iter().position(is_name)?];
            if !parameter.is_null() {
                return None;
            }
            *parameter = *named.add(index as usize);
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
    // SAFETY: the interpreter calls this function with an object of this type, and with an object or null, and with the
    // thread attached.
    let (py, function, object) = unsafe {
        let py = Python::assume_attached();
        (py, Borrowed::<PyAny>::from_ptr(py, function), Borrowed::<PyAny>::from_ptr_or_opt(py, object))
    };
    into_raw(|| match object {
        Some(object) => Ok(METHOD.import(py, "types", "MethodType")?.call1((function, object))?),
        None => Ok(function.to_owned()),
    })
}

/// `__class__`: makes `isinstance(..., types.FunctionType)` and `inspect.isfunction` return True.
unsafe extern "C" fn class(_function: *mut ffi::PyObject, _: *mut c_void) -> *mut ffi::PyObject {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    // SAFETY: the interpreter calls this function with the thread attached.
    let py = unsafe { Python::assume_attached() };
    into_raw(|| Ok(CLASS.import(py, "types", "FunctionType")?.clone()))
}

unsafe extern "C" fn repr(function: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls this function with an object of this type, and with the thread attached.
    let (py, function) = unsafe {
        let py = Python::assume_attached();
        (py, Borrowed::<PyAny>::from_ptr(py, function))
    };
    into_raw(|| {
        let name = function.getattr(intern!(py, "__qualname__"))?;
        Ok(format!("<function {name} at {:p}>", function.as_ptr()).into_bound_py_any(py)?)
    })
}

unsafe extern "C" fn reduce(function: *mut ffi::PyObject, _: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls this function with an object of this type, and with the thread attached.
    let (py, function) = unsafe {
        let py = Python::assume_attached();
        (py, Borrowed::<PyAny>::from_ptr(py, function))
    };
    // `pickle` finds the function by this name in `__module__`.
    into_raw(|| Ok(function.getattr(intern!(py, "__qualname__"))?))
}

unsafe extern "C" fn traverse(object: *mut ffi::PyObject, visit: ffi::visitproc, argument: *mut c_void) -> c_int {
    let function: *mut Function = object.cast();
    // SAFETY: the garbage collector calls this function with an object of this type, while no other code changes the
    // object.  Each reference that the object owns, the one to its type included, is visited once.
    unsafe {
        for object in [ffi::Py_TYPE(object).cast(), (*function).reference, (*function).dict] {
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
    let function: *mut Function = object.cast();
    // SAFETY: the interpreter calls this function with an object of this type, and with the thread attached.
    // `reference` stays, because the function may still be called.
    unsafe { ffi::Py_CLEAR(&raw mut (*function).dict) };
    0
}

unsafe extern "C" fn dealloc(object: *mut ffi::PyObject) {
    let function: *mut Function = object.cast();
    // SAFETY: the interpreter calls this function with the thread attached, and with an object of this type to which
    // there is no reference any more.  The object owns these references, and one to its
    // type.
    unsafe {
        ffi::PyObject_GC_UnTrack(object.cast());
        if !(*function).weakrefs.is_null() {
            ffi::PyObject_ClearWeakRefs(object);
        }
        ffi::Py_CLEAR(&raw mut (*function).dict);
        ffi::Py_CLEAR(&raw mut (*function).reference);
        let class = ffi::Py_TYPE(object);
        ffi::PyObject_GC_Del(object.cast());
        ffi::Py_DECREF(class.cast());
    }
}
