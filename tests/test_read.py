"The strict reader: broken files by hand, broken files by the hundred, good rows through every format, memory, real data."
import csv
import gzip
import io
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proj.core import DataError, ProjError
from proj.data.read import Field, choice, read_beir, read_rows

GOOD = b'{"query": "sort a list", "code": "sorted(x)"}\n'
SHEET = b"query,code,grade,negatives\n"
VALID = SHEET + b"sort a list,sorted(x),1,\n"


def table(**columns) -> bytes:
    "A Parquet file's bytes."
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def refused(path, **options) -> str:
    "The message of the DataError that reading the file must end with."
    with pytest.raises(DataError) as error:
        for _ in read_rows(path, **options): pass
    message = str(error.value)
    message.encode()  # it can be printed
    return message


DEEP = b"[" * 5000 + b"]" * 5000
BAD = [  # name, bytes, "line: field", part of the reason
    # whole files
    ("empty.jsonl", b"", "1: file", "no usable row"),
    ("blank.jsonl", b"\n \r\n\t\n", "1: file", "no usable row"),
    ("empty.csv", b"", "1: file", "no usable row"),
    ("header.csv", SHEET, "1: file", "no usable row"),
    ("empty.jsonl.gz", gzip.compress(b""), "1: file", "no usable row"),
    ("utf16.jsonl", GOOD.decode().encode("utf-16"), "1: file", "UTF-16"),
    ("utf16be.csv", b"\xfe\xff" + VALID.decode().encode("utf-16-be"), "1: file", "UTF-16"),
    ("zipped.jsonl", gzip.compress(GOOD), "1: file", "gzip; add .gz"),
    ("plain.jsonl.gz", GOOD, "1: file", "gzip data is damaged"),
    ("cut.jsonl.gz", gzip.compress(GOOD)[:-25], "1: file", "gzip data is damaged"),
    ("crc.jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, "2: file", "gzip data is damaged"),
    ("tail.jsonl.gz", gzip.compress(GOOD) + b"garbage", "2: file", "gzip data is damaged"),
    ("excel.csv", b"PK\x03\x04rest", "1: file", "zip archive"),
    ("parquet.jsonl", b"PAR1" + GOOD, "1: file", "name it .parquet"),
    ("text.parquet", GOOD, "1: file", "not a readable Parquet file"),
    ("zero.parquet", b"", "1: file", "not a readable Parquet file"),
    ("cut.parquet", table(query=["a"], code=["b"])[:-20], "1: file", "not a readable Parquet file"),
    ("rows0.parquet", table(query=pa.array([], pa.string()), code=pa.array([], pa.string())), "1: file", "no usable row"),
    # JSON that is not
    ("open.jsonl", GOOD + b'{"query": "a", "code": "never closed}\n', "2: code", "not valid JSON"),
    ("comma.jsonl", b'{"query": "a" "code": "b"}\n', "1: query", "not valid JSON"),
    ("trailing.jsonl", b'{"query": "a", "code": "b",}\n', "1: row", "not valid JSON"),
    ("two.jsonl", GOOD.strip() + GOOD, "1: row", "extra data"),
    ("single.jsonl", b"{'query': 'a'}\n", "1: row", "not valid JSON"),
    ("escape.jsonl", b'{"query": "a\\x", "code": "b"}\n', "1: query", "escape"),
    ("array.jsonl", b'[{"query": "a", "code": "b"}]\n', "1: row", "expected a JSON object"),
    ("arrays.jsonl", b"[" * 900 + b"]" * 900, "1: row", "expected a JSON object"),
    ("string.jsonl", GOOD + b'"query"\n', "2: row", "expected a JSON object"),
    ("null.jsonl", GOOD + b"\n\nnull\n", "4: row", "expected a JSON object"),
    ("pretty.jsonl", b'{\n "query": "a",\n "code": "b"\n}\n', "1: row", "not valid JSON"),
    ("twice.jsonl", b'{"query": "a", "code": "b", "query": "c"}\n', "1: query", "appears twice"),
    ("nested.jsonl", b'{"query": "a", "code": "b", "meta": {"x": 1, "x": 2}}\n', "1: meta", "'x' appears twice"),
    ("deep.jsonl", b'{"query": "a", "code": "b", "meta": ' + DEEP + b"}\n", "1: meta", "levels deep"),
    ("deepish.jsonl", b'{"query": "a", "code": "b", "meta": ' + b"[" * 150 + b"]" * 150 + b"}\n", "1: meta", "levels deep"),
    ("long.jsonl", GOOD + b'{"query": "' + b"x" * 70_000 + b'"}\n' + GOOD, "2: row", "longer than 65,536 bytes"),
    ("bom2.jsonl", GOOD + b"\xef\xbb\xbf" + GOOD, "2: row", "not valid JSON"),
    # characters
    ("nul.jsonl", b'{"query": "a\0b", "code": "c"}\n', "1: query", "NUL"),
    ("nulescape.jsonl", b'{"query": "a", "code": "\\u0000"}\n', "1: code", "NUL"),
    ("tab.jsonl", b'{"query": "a", "code": "x\ty"}\n', "1: code", "control character"),
    ("surrogate.jsonl", GOOD + b'{"query": "\\ud83d", "code": "c"}\n', "2: query", "lone surrogate"),
    ("rawsurrogate.jsonl", b'{"query": "\xed\xa0\x80", "code": "c"}\n', "1: query", "byte 0xed at offset 11"),
    ("latin.jsonl", GOOD + GOOD + b'{"query": "x", "code": "caf\xe9"}\n', "3: code", "byte 0xe9 at offset 27"),
    ("key.jsonl", b'{"\\ud800": 1, "query": "x", "code": "y"}\n', "1: row", "a key holds a lone surrogate"),
    # values
    ("nan.jsonl", b'{"query": "a", "code": "b", "grade": NaN}\n', "1: grade", "NaN is not a finite number"),
    ("infinity.jsonl", b'{"query": "a", "code": "b", "meta": [-Infinity]}\n', "1: meta", "-Infinity is not"),
    ("overflow.jsonl", b'{"query": "a", "code": "b", "score": 1e999}\n', "1: score", "not a finite number"),
    ("digits.jsonl", b'{"query": "a", "code": "b", "score": ' + b"9" * 5000 + b"}\n", "1: score", "5000 digits"),
    ("missing.jsonl", b'{"query": "a"}\n', "1: code", "'code' or 'positive' or 'document'"),
    ("nullvalue.jsonl", b'{"query": null, "code": "b"}\n', "1: query", "missing"),
    ("blankvalue.jsonl", '{"query": "\u3000\\n", "code": "b"}\n'.encode(), "1: query", "non-blank"),
    ("both.jsonl", b'{"query": "a", "code": "b", "document": "c"}\n', "1: document", "given beside 'code'"),
    ("number.jsonl", b'{"query": 7, "code": "b"}\n', "1: query", "got 7"),
    ("boolean.jsonl", b'{"query": "a", "code": "b", "grade": true}\n', "1: grade", "got True"),
    ("quoted.jsonl", b'{"query": "a", "code": "b", "grade": "3"}\n', "1: grade", "got '3'"),
    ("negatives.jsonl", b'{"query": "a", "code": "b", "negatives": "c"}\n', "1: negatives", "list of non-blank strings"),
    ("negative.jsonl", b'{"query": "a", "code": "b", "negatives": ["c", ""]}\n', "1: negatives", "list of non-blank strings"),
    # tables
    ("columns.csv", b"query,answer\na,b\n", "1: code", "given are 'query', 'answer'"),
    ("columntwice.csv", b"query,code,query\na,b,c\n", "1: query", "twice in the header"),
    ("nameless.csv", b"query,code,\na,b,c\n", "1: row", "column 3 of the header has no name"),
    ("semicolon.csv", b"query;code\na;b\n", "1: query", "given are 'query;code'"),
    ("many.csv", b'query,code\n"a\n\n",b\nc,d,e\n', "5: row", "has 3 fields, the header has 2"),
    ("few.tsv", b"query\tcode\r\na\tb\r\n\r\nc\r\n", "4: row", "has 1 fields, the header has 2"),
    ("openquote.csv", VALID + b'"a,b,1,\nc,d,1,\n', "3: row", "unexpected end of data"),
    ("junkquote.csv", VALID + b'"a"b,c,1,\n', "3: row", "not valid CSV"),
    ("return.csv", VALID + b"a\rb,c,1,\n", "3: row", "carriage return"),
    ("blankcell.csv", VALID + b" ,c,1,\n", "3: query", "non-blank"),
    ("emptycell.csv", VALID + b",c,1,\n", "3: query", "missing"),
    ("nan.csv", VALID + b"a,b,nan,\n", "3: grade", "got 'nan'"),
    ("overflow.csv", VALID + b"a,b,-1e999,\n", "3: grade", "not a finite number"),
    ("list.csv", VALID + b'a,b,1,"[""c"", 2]"\n', "3: negatives", "list of non-blank strings"),
    ("surrogate.csv", VALID + b'a,b,1,"[""\\ud800""]"\n', "3: negatives", "lone surrogate"),
    ("nul.csv", VALID + b"a,b\0,1,\n", "3: code", "NUL"),
    ("latin.csv", VALID + b'"two\nlines",caf\xe9,1,\n', "3: code", "byte 0xe9 is not UTF-8"),
    ("latinheader.csv", b"query,code,caf\xe9\na,b,c\n", "1: file", "header is not UTF-8"),
    ("long.csv", VALID + b'"' + b"x\n" * 40_000 + b'",b,1,\n', "3: row", "is a quote left open?"),
    ("null.parquet", table(query=["a", None], code=["b", "c"]), "2: query", "missing"),
    ("blank.parquet", table(query=["a", "b"], code=["b", " "]), "2: code", "non-blank"),
    ("nan.parquet", table(query=["a"], code=["b"], grade=[float("nan")]), "1: grade", "not a finite number"),
    ("nul.parquet", table(query=["a\0"], code=["b"]), "1: query", "NUL"),
    ("bytes.parquet", table(query=[b"a"], code=["b"]), "1: query", "non-blank string"),
    ("columns.parquet", table(query=["a"], answer=["b"]), "1: code", "missing"),
]


@pytest.mark.parametrize("name,content,where,reason", BAD, ids=[row[0] for row in BAD])
def test_bad_file_by_hand(tmp_path, name, content, where, reason):
    path = tmp_path / name
    path.write_bytes(content)
    first = refused(path, max_line_bytes=65_536).splitlines()[0]
    assert first.startswith(f"{path}:{where}: ") and reason in first


def test_there_are_sixty(): assert len(BAD) >= 60


# Generated faults

ODD = ["plain", 'say "hi"', "a,b;c\td", "two\nlines", "dos\r\nlines", "\u2028 and \x85 end no line", "naïve 東京 \U0001f600", "[not json", "\\n {x}"]


def good_rows(draw: random.Random, n: int) -> list[dict]:
    rows = []
    for at in range(n):
        row = {"query": f"{draw.choice(ODD)} {at}", draw.choice(["code", "positive", "document"]): f"{draw.choice(ODD)} {at}"}
        if draw.random() < 0.5: row["grade"] = draw.choice([0, 3, 0.25, -1.5])
        if draw.random() < 0.5: row["negatives"] = [draw.choice(ODD) for _ in range(draw.randrange(3))]
        rows.append(row)
    return rows


def json_line(row: dict) -> bytes: return json.dumps(row, ensure_ascii=False).encode()


def answer(row: dict) -> str: return next(name for name in ("code", "positive", "document") if name in row)


def plant_json(row: dict, kind: str) -> tuple[bytes, str]:
    "The line with one fault, and the field that must be named."
    a, q = answer(row), json.dumps(row["query"], ensure_ascii=False).encode()
    text = lambda **change: json_line({**row, **change})
    inside = lambda raw: json_line({**row, "query": "HERE"}).replace(b"HERE", raw)
    with_extra = lambda raw: json_line({**row, "extra": "HERE"}).replace(b'"HERE"', raw)
    return {
        "missing query": lambda: (json_line({k: v for k, v in row.items() if k != "query"}), "query"),
        "missing answer": lambda: (json_line({k: v for k, v in row.items() if k != a}), "code"),
        "two answers": lambda: (json_line({**row, "code": "x", "positive": "y"}), "positive"),
        "blank": lambda: (text(**{a: " \n"}), a),
        "null": lambda: (text(query=None), "query"),
        "number": lambda: (text(**{a: 5}), a),
        "list": lambda: (text(query=["a"]), "query"),
        "grade text": lambda: (text(grade="high"), "grade"),
        "grade bool": lambda: (text(grade=False), "grade"),
        "score nan": lambda: (text(score=float("nan")), "score"),
        "grade infinite": lambda: (text(grade=float("-inf")), "grade"),
        "extra overflow": lambda: (with_extra(b"[[0, 1], [2, 1e400]]"), "extra"),
        "extra digits": lambda: (with_extra(b"1" * 6000), "extra"),
        "extra deep": lambda: (with_extra(b'{"a":' * 4000 + b"1" + b"}" * 4000), "extra"),
        "extra twice": lambda: (with_extra(b'[{"k": 1, "k": 1}]'), "extra"),
        "negatives text": lambda: (text(negatives="x"), "negatives"),
        "negatives blank": lambda: (text(negatives=["x", "\t"]), "negatives"),
        "nul": lambda: (inside(b"a\0b"), "query"),
        "nul escape": lambda: (inside(b"\\u0000"), "query"),
        "surrogate": lambda: (inside(b"\\udfff x"), "query"),
        "latin": lambda: (inside(b"caf\xe9"), "query"),
        "cut character": lambda: (inside("東".encode()[:2]), "query"),
        "control": lambda: (inside(b"\x0b"), "query"),
        "repeated": lambda: (json_line(row)[:-1] + b', "query": ' + q + b"}", "query"),
        "not an object": lambda: (b"[" + json_line(row) + b"]", "row"),
        "cut": lambda: (b'{"query": ' + q + b', "code": "never en', "code"),
        "no value": lambda: (b'{"query": ' + q + b', "grade": }', "grade"),
        "not json": lambda: (b"query: a", "row"),
        "long": lambda: (inside(b"x" * 100_000), "row"),
    }[kind]()


JSON_FAULTS = ("missing query,missing answer,two answers,blank,null,number,list,grade text,grade bool,score nan,grade infinite,extra overflow,extra digits,"
               "extra deep,extra twice,negatives text,negatives blank,nul,nul escape,surrogate,latin,cut character,control,repeated,not an object,cut,"
               "no value,not json,long").split(",")
COLUMNS = ["query", "code", "positive", "document", "grade", "negatives"]


def cells(row: dict) -> list[str]:
    return [value if isinstance(value := row.get(name, ""), str) else json.dumps(value, ensure_ascii=False) for name in COLUMNS]


def csv_line(values: list[str], delimiter: str, end: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerow(values)
    return out.getvalue().encode()


def plant_csv(row: dict, kind: str, delimiter: str, end: str) -> tuple[bytes, str]:
    line = lambda **change: csv_line(cells({**row, **change}), delimiter, end)
    return {
        "missing query": lambda: (line(query=""), "query"),
        "missing answer": lambda: (line(**{answer(row): ""}), "code"),
        "two answers": lambda: (line(code="x", positive="y"), "positive"),
        "blank": lambda: (line(query=" \n "), "query"),
        "grade text": lambda: (line(grade="high"), "grade"),
        "grade nan": lambda: (line(grade="NaN"), "grade"),
        "grade overflow": lambda: (line(grade="1e999"), "grade"),
        "negatives text": lambda: (line(negatives="x"), "negatives"),
        "negatives surrogate": lambda: (line(negatives='["\\ud834"]'), "negatives"),
        "nul": lambda: (line(query="a\0"), "query"),
        "latin": lambda: (line(query="HERE").replace(b"HERE", b"\xe9"), "query"),
        "too many": lambda: (csv_line([*cells(row), "x"], delimiter, end), "row"),
        "too few": lambda: (csv_line(cells(row)[:3], delimiter, end), "row"),
        "after quote": lambda: (b'"a"b' + delimiter.encode() + b"c" + end.encode(), "row"),
        "return": lambda: (b"a\rb" + delimiter.encode() + b"c" + end.encode(), "row"),
        "long": lambda: (line(query="x" * 100_000), "row"),
    }[kind]()


CSV_FAULTS = ("missing query,missing answer,two answers,blank,grade text,grade nan,grade overflow,negatives text,negatives surrogate,nul,latin,"
              "too many,too few,after quote,return,long").split(",")
PARQUET_FAULTS = {"null": ("query", None), "blank": ("query", " "), "nul": ("query", "a\0b"), "latin": ("query", b"caf\xe9"), "nan": ("grade", float("nan")),
                  "two answers": ("positive", "y"), "blank negative": ("negatives", ["a", ""]), "null negative": ("negatives", ["a", None])}


def parquet_file(path, rows):
    "All columns with their types; bytes stand for a string that is not UTF-8."
    columns = {name: [row.get(name) for row in rows] for name in COLUMNS}
    columns["grade"] = [None if g is None else float(g) for g in columns["grade"]]
    text = {name: pa.array([v.encode() if isinstance(v, str) else v for v in columns[name]], pa.binary()).view(pa.string()) for name in COLUMNS[:4]}
    pq.write_table(pa.table({**text, "grade": pa.array(columns["grade"], pa.float64()), "negatives": pa.array(columns["negatives"], pa.list_(pa.string()))}), path)


def write(path, chunks: list[bytes]):
    data = b"".join(chunks)
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("seed", range(500))
def test_planted_fault_is_named(tmp_path, seed):
    draw = random.Random(seed)
    rows = good_rows(draw, draw.randrange(2, 40))
    at = draw.randrange(len(rows))
    ending = draw.choice([".jsonl", ".jsonl", ".jsonl.gz", ".csv", ".csv", ".tsv", ".tsv.gz", ".parquet"])
    path, end = tmp_path / f"data{ending}", draw.choice(["\n", "\r\n"])
    if ending == ".parquet":
        field, value = PARQUET_FAULTS[kind := draw.choice(list(PARQUET_FAULTS))]
        rows[at] = {"query": "q", "code": "c", **rows[at]} if kind != "two answers" else {"query": "q", "code": "c"}
        rows[at] = {k: v for k, v in rows[at].items() if k not in ("positive", "document")} | {field: value}
        parquet_file(path, rows)
        line = at + 1
    else:
        delimiter = "\t" if ".tsv" in ending else ","
        jsonl = ".jsonl" in ending
        chunks = [json_line(row) + end.encode() if jsonl else csv_line(cells(row), delimiter, end) for row in rows]
        kind = draw.choice(JSON_FAULTS if jsonl else CSV_FAULTS)
        planted, field = plant_json(rows[at], kind) if jsonl else plant_csv(rows[at], kind, delimiter, end)
        chunks[at] = planted + end.encode() if jsonl else planted
        blank = [end.encode() * draw.choice([0, 0, 1, 3]) for _ in chunks]
        before = [b"" if jsonl else csv_line(COLUMNS, delimiter, end)] + [part for pair in zip(blank, chunks) for part in pair]
        before[0] = draw.choice([b"", b"\xef\xbb\xbf"]) + before[0]
        write(path, before)
        line = 1 + b"".join(before[:2 * at + 2]).count(b"\n")
    first = refused(path, max_line_bytes=65_536).splitlines()[0]
    assert first.startswith(f"{path}:{line}: {field}: "), (kind, line, field, first)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".csv", ".tsv.gz", ".parquet"])
def test_no_bytes_make_a_traceback(tmp_path, ending):
    draw, path = random.Random(ending), tmp_path / f"data{ending}"
    rows = good_rows(draw, 8)
    if ending == ".parquet": parquet_file(path, rows)
    else:
        header = [] if "jsonl" in ending else [csv_line(COLUMNS, "\t" if "tsv" in ending else ",", "\n")]
        write(path, header + [json_line(row) + b"\n" if "jsonl" in ending else csv_line(cells(row), "\t" if "tsv" in ending else ",", "\n") for row in rows])
    original = path.read_bytes()
    for _ in range(150):
        data = bytearray(original)
        for _ in range(draw.randrange(1, 4)): data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(data[:draw.randrange(1, len(data))] if draw.random() < 0.3 else data))
        try:
            for _ in read_rows(path): pass
        except ProjError as e: assert str(e).startswith(str(path))


# Good rows

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30).filter(lambda s: s.strip() != "")
row_strategy = st.builds(lambda query, name, value, rest: {"query": query, name: value, **rest}, texts, st.sampled_from(["code", "positive", "document"]), texts,
                         st.fixed_dictionaries({}, optional={"grade": st.integers(-2**40, 2**40) | st.floats(allow_nan=False, allow_infinity=False),
                                                             "negatives": st.lists(texts, max_size=3), "note": texts}))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(row_strategy, min_size=1, max_size=6), escaped=st.booleans())
def test_good_rows_come_back_from_every_format(tmp_path, rows, escaped):
    columns = [*COLUMNS, "note"]
    for ending in (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet"):
        path = tmp_path / f"data{ending}"
        if ending == ".parquet":
            floats = [{**row, "grade": float(row["grade"])} if "grade" in row else row for row in rows]
            pq.write_table(pa.Table.from_pylist(floats, pa.schema([(name, pa.string()) for name in columns[:4]] + [
                ("grade", pa.float64()), ("negatives", pa.list_(pa.string())), ("note", pa.string())])), path)
        elif "jsonl" in ending: write(path, [json.dumps(row, ensure_ascii=escaped).encode() + b"\n" for row in rows])
        else:
            delimiter, out = "\t" if "tsv" in ending else ",", io.StringIO()
            writer = csv.DictWriter(out, columns, delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if not isinstance(v, str) else v for k, v in row.items()} for row in rows)
            path.write_bytes(gzip.compress(out.getvalue().encode()) if ending.endswith(".gz") else out.getvalue().encode())
        assert [row for _, row in read_rows(path)] == rows, ending


def test_line_numbers_are_an_editors(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n  \n" + GOOD.strip() + b"\r\n" + GOOD.replace(b"list", "\u2028list".encode()) + GOOD.strip())
    assert [line for line, _ in read_rows(path)] == [1, 4, 5, 6]


def test_a_long_line_at_the_limit(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    assert len(list(read_rows(path, max_line_bytes=len(GOOD)))) == 1
    assert "1: row: the line is longer" in refused(path, max_line_bytes=len(GOOD) - 1)


def test_reading_goes_on_after_a_long_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"x" * 3_000_000 + b"\n" + GOOD)
    assert [line for line, _ in read_rows(path, skip_bad=1, max_line_bytes=1_000)] == [1, 3]


# Files that cannot be opened

def test_missing_file_and_unknown_kind(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    (tmp_path / "train.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match="no such file; did you mean 'train.jsonl'"): read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="no such file$"): read_rows(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(DataError, match=r"unknown kind of file '.xlsx'.*\.jsonl.*\.parquet"): read_rows(tmp_path / "train.xlsx")
    with pytest.raises(DataError, match="is a folder"): read_rows(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    with pytest.raises(ProjError, match="permission denied"): list(read_rows(path))


# Skipping

def lines_with_bad(bad: set[int], n: int) -> bytes:
    return b"".join(GOOD if line not in bad else b'{"query": "", "code": "x"}\n' for line in range(1, n + 1))


def test_problems_are_collected_up_to_twenty(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines_with_bad(set(range(5, 100, 2)), 200))
    shown = refused(path).splitlines()
    assert len(shown) == 21 and shown[0].startswith(f"{path}:5: ") and shown[19].startswith(f"{path}:43: ") and "20 or more" in shown[-1]
    path.write_bytes(lines_with_bad({3, 7}, 50))
    shown = refused(path).splitlines()
    assert len(shown) == 3 and "2 bad rows" in shown[-1] and "skip_bad" in shown[-1]


def test_skip_bad_counts_and_writes_rejects(tmp_path, caplog):
    path, rejects = tmp_path / "rows.jsonl", tmp_path / "out" / "rejects.jsonl"
    path.write_bytes(lines_with_bad({2, 4, 9}, 10) + b'{"query": "\xff", "code": "' + b"y" * 5000 + b'"}\n')
    with caplog.at_level(logging.WARNING, "proj"): rows = list(read_rows(path, skip_bad=4, rejects=rejects))
    assert [line for line, _ in rows] == [1, 3, 5, 6, 7, 8, 10] and "4 bad rows skipped" in caplog.text
    written = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(r["file"], r["line"], r["field"]) for r in written] == [(str(path), n, "query") for n in (2, 4, 9, 11)]
    assert written[0]["raw"] == '{"query": "", "code": "x"}\n' and len(written[3]["raw"]) == 500 and "0xff" in written[3]["reason"]
    assert refused(path, skip_bad=3).startswith(f"{path}:2: query: ")
    assert list(read_rows(path, skip_bad=40)) == rows


def test_nothing_rejected_is_an_empty_file(tmp_path):
    path, rejects = tmp_path / "rows.jsonl", tmp_path / "rejects.jsonl"
    path.write_bytes(GOOD)
    rejects.write_text("from an earlier run")
    assert len(list(read_rows(path, skip_bad=1, rejects=rejects))) == 1 and rejects.read_text() == ""


@pytest.mark.parametrize("name,content", [("rows.jsonl", b'{"query": ""}\n' * 3), ("rows.jsonl.gz", gzip.compress(GOOD * 100)[:-20]), ("rows.csv", SHEET),
                                          ("rows.csv", VALID + b'"' + b"open\n" * 20_000)], ids=["empty queries", "cut gzip", "no row", "open quote"])
def test_structure_is_never_skipped(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert "skip_bad does not help" in refused(path, skip_bad=10**6, max_line_bytes=65_536)


# Identifiers and other schemas

def test_repeated_ids(tmp_path, caplog):
    path = tmp_path / "docs.jsonl"
    rows = [{"_id": str(n), "text": f"text {n}"} for n in range(3000)]
    path.write_bytes(b"".join(json_line(row) + b"\n" for row in rows + rows[::2]))
    with caplog.at_level(logging.WARNING, "proj"): got = [row for _, row in read_rows(path, required=(("text",),), unique="_id")]
    assert got == rows and "1500 exact repetitions" in caplog.text
    path.write_bytes(path.read_bytes() + json_line({"_id": "2999", "text": "other"}) + b"\n")
    assert refused(path, required=(("text",),), unique="_id").startswith(f"{path}:4501: _id: '2999' was on line 3000 with other content")
    path.write_bytes(b'{"_id": 5, "text": "a"}\n')
    assert ":1: _id: expected a non-blank string, got 5" in refused(path, required=(("text",),), unique="_id")


def test_other_tasks_declare_their_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    columns = (("prompt",), ("model_a",), ("model_b",), ("winner",))
    row = {"prompt": "hi", "model_a": "m", "model_b": "n", "winner": "tie"}
    path.write_bytes(json_line(row) + b"\n" + json_line({**row, "winner": "nobody"}))
    winner = choice("model_a", "model_b", "tie", "both_bad")
    assert refused(path, required=columns, types={"winner": winner}).startswith(f"{path}:2: winner: expected one of model_a, model_b, tie, both_bad")
    points = Field("a list of [x, y, ms]", lambda v: type(v) is list and all(type(p) is list and len(p) == 3 for p in v))
    path.write_bytes(b'{"word": "an", "path": [[0.1, 0.2, 0], [0.1, 0.3, 8]]}\n{"word": "it", "path": [[0.1, 0.2]]}\n')
    assert refused(path, required=(("word",), ("path",)), types={"path": points}).startswith(f"{path}:2: path: expected a list of [x, y, ms]")


# BEIR folders

def beir(folder: Path, corpus=None, queries=None, qrels=None) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_bytes(corpus or b'{"_id": "d1", "title": "A", "text": "one"}\n{"_id": "d2", "title": "B", "text": ""}\n')
    (folder / "queries.jsonl").write_bytes(queries or b'{"_id": "q1", "text": "which"}\n')
    (folder / "qrels/test.tsv").write_bytes(qrels or b"query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\n")
    return folder


EXPECTED = [("queries", {"query_id": "q1", "text": "which"}), ("documents", {"doc_id": "d1", "text": "A one"}), ("documents", {"doc_id": "d2", "text": "B"}),
            ("judgements", {"query_id": "q1", "doc_id": "d1", "grade": 1}), ("judgements", {"query_id": "q1", "doc_id": "d2", "grade": 0})]


def test_beir_folder_with_either_kind_of_qrels(tmp_path):
    assert list(read_beir(beir(tmp_path / "beir"), "test")) == EXPECTED
    assert list(read_beir(beir(tmp_path / "trec", qrels=b"q1 0 d1 1\nq1\t0\td2  0\n"), "test")) == EXPECTED
    zipped = beir(tmp_path / "zipped")
    for path in [zipped / "corpus.jsonl", zipped / "qrels/test.tsv"]:
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert list(read_beir(zipped, "test")) == EXPECTED


HEADER = b"query-id\tcorpus-id\tscore\n"


@pytest.mark.parametrize("content,where,reason", [
    ({"qrels": HEADER + b"q1\td1\t1\nq9\td1\t1\n"}, "qrels/test.tsv:3: query-id", "'q9' is not in queries.jsonl"),
    ({"qrels": HEADER + b"q1\td9\t1\n"}, "qrels/test.tsv:2: corpus-id", "'d9' is not in corpus.jsonl"),
    ({"qrels": HEADER + b"q1\td1\t0.5\n"}, "qrels/test.tsv:2: score", "a whole number"),
    ({"qrels": HEADER + b"q1\td1\t1\nq1\td1\t2\n"}, "qrels/test.tsv:3: query-id", "was on line 2 with other content"),
    ({"qrels": b"query\tdoc\tscore\nq1\td1\t1\n"}, "qrels/test.tsv:1: query-id", "missing"),
    ({"qrels": b"q1 0 d1 1\nq1 0 d9 1\n"}, "qrels/test.tsv:2: corpus-id", "'d9' is not in"),
    ({"qrels": b"q1 0 d1 1\n\nq1 0 d2\n"}, "qrels/test.tsv:3: row", "TREC qrels have 4"),
    ({"qrels": b"q1 0 d1 x\n"}, "qrels/test.tsv:1: score", "a whole number"),
    ({"qrels": b"q1 0 d\xe9 1\n"}, "qrels/test.tsv:1: corpus-id", "not UTF-8"),
    ({"qrels": HEADER}, "qrels/test.tsv:1: file", "no usable row"),
    ({"corpus": b'{"_id": "d1", "text": "a"}\n{"_id": "d2", "text": " ", "title": ""}\n'}, "corpus.jsonl:2: text", "blank, and so is the title"),
    ({"corpus": b'{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n'}, "corpus.jsonl:2: _id", "was on line 1"),
    ({"corpus": b'{"_id": 1, "text": "a"}\n'}, "corpus.jsonl:1: _id", "got 1"),
    ({"queries": b'{"_id": "q1", "text": ""}\n'}, "queries.jsonl:1: text", "non-blank"),
])
def test_beir_faults(tmp_path, content, where, reason):
    folder = beir(tmp_path / "beir", **content)
    with pytest.raises(DataError) as error: list(read_beir(folder, "test"))
    first = str(error.value).splitlines()[0]
    assert first.startswith(f"{folder}/{where}: ") and reason in first


def test_beir_skips_over_the_three_files_together(tmp_path):
    folder = beir(tmp_path / "beir", qrels=HEADER + b"q1\td1\t1\nq9\td1\t1\n", queries=b'{"_id": "q1", "text": "which"}\n{"_id": "q2"}\n')
    got = list(read_beir(folder, "test", skip_bad=2, rejects=tmp_path / "rejects.jsonl"))
    assert got == EXPECTED[:4] and [json.loads(r)["line"] for r in (tmp_path / "rejects.jsonl").read_text().splitlines()] == [2, 3]
    with pytest.raises(DataError): list(read_beir(folder, "test", skip_bad=1))


def test_folders_that_are_not_beir(tmp_path):
    with pytest.raises(DataError, match="not a BEIR folder, queries.jsonl is missing"): read_beir(tmp_path, "test")
    folder = beir(tmp_path / "beir")
    with pytest.raises(DataError, match=r"no split 'tets'; did you mean 'test'\? \(choose from test\)"): read_beir(folder, "tets")


# Memory

PEAK = """
import resource, sys
from proj.data.read import read_rows
for path in sys.argv[1:]:
    n = sum(1 for _ in read_rows(path, unique="_id"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_megabytes(*paths) -> int:
    return int(subprocess.run([sys.executable, "-c", PEAK, *map(str, paths)], capture_output=True, text=True, check=True).stdout)


def test_memory_does_not_grow_with_the_file(tmp_path):
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    for path, n in [(small, 7_500), (large, 75_000)]:
        with open(path, "w") as f:
            for at in range(n): f.write(f'{{"_id": "{at}", "query": "number {at}", "code": "{"x = 1; " * 280}"}}\n')
    assert large.stat().st_size > 150e6 > 10 * 14e6 and peak_megabytes(large) - peak_megabytes(small) < 30


def test_parquet_memory_does_not_grow_with_the_file(tmp_path):
    for name, groups in [("small", 2), ("large", 20)]:
        with pq.ParquetWriter(tmp_path / f"{name}.parquet", pa.schema([(c, pa.string()) for c in ("_id", "query", "code")])) as writer:
            for group in range(groups):
                ids = [f"{group}-{at}" for at in range(2_000)]
                writer.write_table(pa.table({"_id": ids, "query": ids, "code": [f"{n} {'x = 1; ' * 280}" for n in ids]}))
    assert peak_megabytes(tmp_path / "large.parquet") - peak_megabytes(tmp_path / "small.parquet") < 30


# Real data

@pytest.mark.parametrize("name", ["pymined/train.jsonl", "pymined/val.jsonl", "medquad/train.jsonl", "medquad/dev.jsonl"])
def test_real_pairs(data_dir, name):
    with open(data_dir / name, "rb") as f: plain = [(line, json.loads(raw)) for line, raw in enumerate(f, start=1)]
    got = list(read_rows(data_dir / name))
    assert [line for line, _ in got] == [line for line, _ in plain]
    assert all(row == {k: v for k, v in other.items() if v is not None} for (_, row), (_, other) in zip(got, plain))


@pytest.mark.parametrize("split,judgements", [("test", 339), ("train", 919)])
def test_real_beir(data_dir, split, judgements):
    tables = {"queries": 0, "documents": 0, "judgements": 0}
    for table_name, _ in read_beir(data_dir / "scifact", split): tables[table_name] += 1
    assert tables == {"queries": 1109, "documents": 5183, "judgements": judgements}


@pytest.mark.parametrize("name,required,rows", [
    ("routellm/mmlu.jsonl", (("prompt",), ("model_a",), ("model_b",), ("winner",)), 14_042),
    ("mt_bench_human/human.jsonl", (("prompt",), ("model_a",), ("model_b",), ("winner",)), 1_751),
    ("openclip/scores.jsonl", (("dataset",), ("model",), ("score",)), 4_598),
    ("swipe/real_train.jsonl", (("word",),), 736),
    ("swipe/vocab.tsv", (("word",), ("zipf",)), 10_033)])
def test_real_data_of_other_tasks(data_dir, name, required, rows):
    assert sum(1 for _ in read_rows(data_dir / name, required=required)) == rows
