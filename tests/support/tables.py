"""Tables on disk, for tests that read them."""

import json

PLAIN = "text,label\na,x\nb,y\n"


def write(folder, name, content=PLAIN):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(folder, name, rows):
    import pyarrow as pa
    from pyarrow.parquet import write_table

    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_table(pa.Table.from_pylist(rows), folder / name)
    return folder / name
