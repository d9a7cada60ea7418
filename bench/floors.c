/* The minimum that the interpreter itself costs: a C call, and awaiting an awaitable that is ready. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* `await` calls am_send on 3.11 and tp_iternext on later versions; NULL without an exception means None. */

typedef struct { PyObject_HEAD } Ready;

#ifdef Py_GIL_DISABLED
#define FREE_LIST 0
#else
#define FREE_LIST 1
#endif

static PyObject *freed;

static PySendResult ready_send(PyObject *self, PyObject *sent, PyObject **result) {
    (void)self, (void)sent;
    Py_INCREF(Py_None);
    *result = Py_None;
    return PYGEN_RETURN;
}

static PyObject *ready_await(PyObject *self) {
    Py_INCREF(self);
    return self;
}

static PyObject *ready_next(PyObject *self) {
    (void)self;
    return NULL;
}

static void ready_free(PyObject *self) {
    if (FREE_LIST && freed == NULL)
        freed = self;
    else
        PyObject_Free(self);
}

static PyAsyncMethods ready_async = {.am_await = ready_await, .am_send = ready_send};

static PyTypeObject ready_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "ready",
    .tp_basicsize = sizeof(Ready),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_dealloc = ready_free,
    .tp_as_async = &ready_async,
    .tp_iter = PyObject_SelfIter,
    .tp_iternext = ready_next,
};

static PyObject *call(PyObject *module, PyObject *argument) {
    (void)module;
    Py_INCREF(argument);
    return argument;
}

static PyObject *ready(PyObject *module, PyObject *argument) {
    (void)module, (void)argument;
    if (FREE_LIST && freed != NULL) {
        PyObject *reused = PyObject_Init(freed, &ready_type);
        freed = NULL;
        return reused;
    }
    return (PyObject *)PyObject_New(Ready, &ready_type);
}

static PyMethodDef methods[] = {{"call", call, METH_O, NULL}, {"ready", ready, METH_O, NULL}, {NULL, NULL, 0, NULL}};

static int prepare(PyObject *module) {
    (void)module;
    return PyType_Ready(&ready_type);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, prepare},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "floors", NULL, 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_floors(void) { return PyModuleDef_Init(&definition); }
