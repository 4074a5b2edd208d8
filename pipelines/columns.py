"""What the columns of tables hold, in words."""

import pyarrow as pa


def kind_of(column: pa.DataType) -> str:
    """`string`, `number`, `list of string` and so on, however it is stored; of other types their own name."""
    if pa.types.is_dictionary(column):
        return kind_of(column.value_type)
    if pa.types.is_list(column) or pa.types.is_large_list(column) or pa.types.is_fixed_size_list(column):
        return f"list of {kind_of(column.value_type)}"
    if pa.types.is_string(column) or pa.types.is_large_string(column):
        return "string"
    return "number" if pa.types.is_integer(column) or pa.types.is_floating(column) else str(column)
