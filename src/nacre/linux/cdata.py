"""C's types, structures and functions: `ctypes` to type checkers, at run time as much of it as is used here, on ctypes' C half.

The Python half makes thirty classes that nobody here asks for, and loads `types` and `struct`: 2 ms of every create.
"""

from __future__ import annotations

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from ctypes import (
        CDLL,
        POINTER,
        Array,
        PyDLL,
        Structure,
        addressof,
        byref,
        c_char,
        c_char_p,
        c_int,
        c_int32,
        c_long,
        c_uint,
        c_uint32,
        c_uint64,
        c_ulong,
        c_ushort,
        c_void_p,
        create_string_buffer,
        get_errno,
        sizeof,
    )
else:
    from _ctypes import (
        FUNCFLAG_CDECL,
        FUNCFLAG_PYTHONAPI,
        FUNCFLAG_USE_ERRNO,
        POINTER,
        RTLD_LOCAL,
        Array,
        CFuncPtr,
        Structure,
        _SimpleCData,
        addressof,
        byref,
        dlopen,
        get_errno,
        sizeof,
    )

    class c_char(_SimpleCData):
        _type_ = "c"

    class c_ushort(_SimpleCData):
        _type_ = "H"

    class c_int(_SimpleCData):
        _type_ = "i"

    class c_uint(_SimpleCData):
        _type_ = "I"

    class c_long(_SimpleCData):
        _type_ = "l"

    class c_ulong(_SimpleCData):
        _type_ = "L"

    class c_uint64(_SimpleCData):
        _type_ = "Q"

    class c_char_p(_SimpleCData):
        _type_ = "z"

    class c_void_p(_SimpleCData):
        _type_ = "P"

    c_int32, c_uint32 = c_int, c_uint

    def create_string_buffer(content, size=None):
        """`content` with a zero behind it, or in exactly `size` bytes."""
        buffer = (c_char * (len(content) + 1 if size is None else size))()
        buffer.value = content
        return buffer

    class CDLL:
        """The library `name`, None being all that the interpreter itself is linked with. `[name]` is a function of its own each time."""

        _flags = FUNCFLAG_CDECL

        def __init__(self, name, *, use_errno=False):
            class Function(CFuncPtr):
                _flags_ = self._flags | (FUNCFLAG_USE_ERRNO if use_errno else 0)
                _restype_ = c_int

            self._handle = dlopen(name, RTLD_LOCAL)  # CFuncPtr finds it by this name
            self._function = Function

        def __getitem__(self, name):
            return self._function((name, self))

        def __getattr__(self, name):
            self.__dict__[name] = self[name]
            return self.__dict__[name]

    class PyDLL(CDLL):
        """Called with the interpreter lock held."""

        _flags = FUNCFLAG_CDECL | FUNCFLAG_PYTHONAPI


pythonapi = PyDLL(None)

__all__ = [
    "CDLL",
    "POINTER",
    "Array",
    "PyDLL",
    "Structure",
    "addressof",
    "byref",
    "c_char",
    "c_char_p",
    "c_int",
    "c_int32",
    "c_long",
    "c_uint",
    "c_uint32",
    "c_uint64",
    "c_ulong",
    "c_ushort",
    "c_void_p",
    "create_string_buffer",
    "get_errno",
    "pythonapi",
    "sizeof",
]
