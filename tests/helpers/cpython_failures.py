"""Which of CPython's tests the containers that grow fail, by the reason; see cpython_suites.py."""

FAILURES: dict[str, dict[str, tuple[str, ...]]] = {
    "BytesIO": {
        "It grows under a live `getbuffer()`, which BytesIO refuses.": (
            "test_getbuffer",
            "test_getbuffer_empty",
        ),
        "Iteration gives ints, as for a bytearray; `readline` and `readlines` give lines.": (
            "test_iterator",
        ),
        "It is pickled as class, capacity, bytes and position, without the state of BytesIO and "
        "without the attributes of a subclass.": (
            "test_getstate",
            "test_setstate",
            "test_cow_setstate",
            "test_pickling",
        ),
        "BytesIO shares the bytes it is made from and counts their references.": (
            "test_cow_truncate",
            "test_cow_write",
        ),
        "The test makes one from a list, which the adapter accepts as ints.": ("test_init",),
    },
    "bytearray": {
        "Methods that make new bytes are those of `bytes`: `bytes(b).split()`.": (
            "test_center",
            "test_decode",
            "test_imod",
            "test_join",
            "test_ljust",
            "test_mod",
            "test_partition",
            "test_partition_int_error",
            "test_partition_string_error",
            "test_replace",
            "test_replace_int_error",
            "test_rjust",
            "test_rmod",
            "test_rpartition",
            "test_rsplit_unicodewhitespace",
            "test_split_int_error",
            "test_split_string_error",
            "test_split_unicodewhitespace",
            "test_strip_bytearray",
            "test_strip_int_error",
            "test_strip_string_error",
            "test_translate",
            "test_xjust_int_error",
        ),
        "Its iterator is over the bytes at the start of the iteration, and can't be pickled.": (
            "test_exhausted_iterator",
            "test_iterator_pickling",
        ),
        "An error has the right type and another message.": (
            "test_endswith",
            "test_find",
            "test_startswith",
        ),
        "The test calls `__getitem__` of the sequence slots, which a class in Python lacks.": (
            "test_sq_item",
        ),
    },
    "list": {
        "`+`, `*` and comparisons work on elements, as those of an ndarray.": (
            "test_addmul",
            "test_iadd",
            "test_imul",
            "test_repeat",
        ),
        "Slices are ndarrays over the same memory, without the methods of a list.": (
            "test_count",
            "test_extend",
            "test_getslice",
            "test_setslice",
            "test_subscript",
        ),
        "Items in the middle are not inserted or removed, for views show them.": (
            "test_delitem",
            "test_delslice",
            "test_extendedslicing",
            "test_insert",
            "test_pop",
            "test_remove",
        ),
        "Methods that search or sort are numpy's, on `array`.": (
            "test_copy",
            "test_index",
            "test_reverse",
            "test_sort",
        ),
        "Items are numbers, not objects.": (
            "test_constructors",
            "test_contains_fake",
            "test_contains_order",
            "test_repr_deep",
            "test_slice",
        ),
        "Indices and assigned values follow numpy's rules.": (
            "test_set_subscript",
            "test_setitem",
            "test_slice_assign_iterator",
        ),
        "Its iterator is over the items at the start of the iteration.": (
            "test_exhausted_iterator",
        ),
        "`repr` is short: it names the length, the capacity and the memory.": ("test_repr",),
    },
}
