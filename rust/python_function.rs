//! How a Rust function becomes a Python function.

use std::ffi::CStr;

use pyo3::prelude::*;

/// Creates the Python function whose attributes are those of the argument, a function of the reference implementation.
pub type NewFunction = for<'py> fn(&Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>>;

/// The `NewFunction` whose body is a Rust function in scope: `python_function!(function(first, second = False))`.
///
/// The names of the parameters are those in Python.  A parameter with `= False` has that default in Python.  The Rust
/// function is called with `py` and an argument for each parameter.
///
/// After the word `unguarded`, a panic in the Rust function aborts the process; see `Body::GUARDED`.
macro_rules! python_function {
    ($function:ident($($parameter:ident $(= $default:ident)?),*)) => {
        python_function!(
            @define true,
            [$($parameter $(= $default)?),*],
            |py, [$($parameter),*]| $function(py, $($parameter),*)
        )
    };
    (unguarded $function:ident($($parameter:ident $(= $default:ident)?),*)) => {
        python_function!(
            @define false,
            [$($parameter $(= $default)?),*],
            |py, [$($parameter),*]| $function(py, $($parameter),*)
        )
    };
    (
        @define $guarded:literal,
        [$($name:ident $(= $default:ident)?),*],
        |$py:ident, [$($argument:ident),*]| $call:expr
    ) => {{
        const PARAMETERS: usize = <[&str]>::len(&[$(stringify!($name)),*]);
        const DEFAULTS: usize = <[&str]>::len(&[$($(stringify!($default),)?)*]);
        struct Function;
        impl $crate::raw::Body<PARAMETERS> for Function {
            const PARAMETERS: [&'static ::std::ffi::CStr; PARAMETERS] =
                [$($crate::python_function::c_str(concat!(stringify!($name), "\0"))),*];
            const REQUIRED: usize = PARAMETERS - DEFAULTS;
            const GUARDED: bool = $guarded;

            #[inline(always)]
            fn call<'py>(
                $py: ::pyo3::Python<'py>,
                [$($argument),*]: [$crate::raw::Argument<'_, 'py>; PARAMETERS],
            ) -> $crate::raw::Outcome<'py> {
                $call
            }
        }
        $crate::raw::function::<PARAMETERS, Function> as $crate::python_function::NewFunction
    }};
}

pub(crate) use python_function;

/// The text, which ends with a NUL, as a C string.
pub const fn c_str(text: &str) -> &CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("not a C string"),
    }
}
