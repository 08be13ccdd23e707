"Code pairs: hand-written files with every awkward shape, and the whole standard library."
import ast, random, sys, sysconfig, textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from proj.core import DataError
from proj.data.code import first_paragraph, mine_functions, mine_text, stdlib_pairs
from proj.data.split import normalise


def mined(text):
    return {row["func"]: row["code"] for row in mine_text(textwrap.dedent(text))}


def test_methods_nested_async_and_decorated_functions():
    rows = mine_text(textwrap.dedent('''\
        import functools

        class Outer:
            """A class is not a function."""
            class Inner:
                @functools.cache
                @staticmethod
                def method(value, *,
                           other=None):
                    """Join value and other.

                    Args: two.
                    """
                    # comment
                    return (value,
                        other)

            async def fetch(self):
                "Fetch one of them."
                async def step():
                    """Do a single step."""
                    await self.go()
                    return 1
                return await step()

        try:
            pass
        except ValueError:
            def fallback(x):
                \'\'\'Used when nothing else is there.\'\'\'
                x += 1
                return x

        match 1:
            case 1:
                def matched(x):
                    """Found within a case block."""
                    x += 1
                    return x
        '''))
    assert [(row["func"], row["query"], row["line"]) for row in rows] == [
        ("Outer.Inner.method", "Join value and other.", 8), ("Outer.fetch", "Fetch one of them.", 18), ("Outer.fetch.step", "Do a single step.", 20),
        ("fallback", "Used when nothing else is there.", 29), ("matched", "Found within a case block.", 36)]
    assert rows[0]["code"] == "def method(value, *,\n           other=None):\n    # comment\n    return (value,\n        other)\n"
    assert rows[1]["code"].startswith("async def fetch(self):\n    async def step():\n        \"\"\"Do a single step.\"\"\"\n")
    assert rows[2]["code"] == "async def step():\n    await self.go()\n    return 1\n"


def test_strings_that_span_lines_are_not_touched():
    text = '''\
        class A:
            def usage(self, name):
                """Print how it is used."""
                first = """one
                two
            three
        four"""
                second = f"""{name}
                    {name!r:>
                    10} five
                """
                third = 'six \\
                seven'
                fourth = ("eight"
                          "nine") + \\
                    b"""ten
                    """.decode()
                return first, second, third, fourth
        '''
    text = textwrap.dedent(text) if sys.version_info >= (3, 12) else textwrap.dedent(text.replace("{name!r:>\n                    10}", "{name!r:>10}"))
    code = mined(text)["A.usage"]
    original, moved = {}, {}
    exec(text, original), exec(code, moved)
    assert moved["usage"](None, "x") == original["A"]().usage("x")
    assert '\n    fourth = ("eight"\n              "nine")' in code  # the lines of an implicit concatenation are code


def test_docstring_on_the_line_of_the_code():
    code = mined('''\
        class A:
            def one(self): "Größe 3: not ASCII, no query."; x = 1; return (x,
                1,
                2)
            def two(self): "Three plain words."; x = "ö"; return (x,
                1,
                2)
            def three(self):
                "Three plain words, again."; x = 1
                # why
                return x
            def four(self):
                "Two strings in a row."
                """The second would become the docstring."""  # noqa
                x = 1
                return x
            def five(self): "One line is too short."; return 1
        ''')
    assert code == {"A.two": 'def two(self): x = "ö"; return (x,\n    1,\n    2)\n',
                    "A.three": "def three(self):\n    x = 1\n    # why\n    return x\n",
                    "A.four": "def four(self):\n    x = 1\n    return x\n"}


def test_tabs_comments_at_the_margin_and_blank_lines():
    code = mined('class A:\n\tdef run(self):\n\n\t\t"Run it to the end."\n\n\n# left\n\t\tif self:\n\n\t\t\treturn 1\n\t\treturn 2\n')
    assert code == {"A.run": "def run(self):\n# left\n\tif self:\n\n\t\treturn 1\n\treturn 2\n"}


def test_what_is_left_out():
    body = "\n    x = 1\n    return x\n"
    long = "\n".join(f"    x = {i}" for i in range(120))
    assert not mined("def f():\n    '''Nothing but a docstring.'''\n")
    assert not mined("def f(a,\n      b,\n      c):\n    '''Nothing but a docstring.'''\n    'And one more.'\n")
    assert not mined(f"def f():\n    'Two words'{body}") and not mined(f"def f():\n    'Für drei Wörter'{body}")
    assert not mined(f"def f():\n    '''>>> f() + 1 + 2\n    4'''{body}") and not mined(f"def __repr__(self):\n    'Return the plain text.'{body}")
    assert not mined(f"def f():{body}") and not mined(f"def f():\n    f'Three words here'{body}") and not mined(f"def f():\n    b'Three words here'{body}")
    assert not mined("def f():\n    'A single return only.'\n    return 1\n")
    assert not mined(f"def f():\n    'Longer than it may be.'\n{long}\n")
    assert mined(f"def f():\n    'As long as it may be.'\n{long[:long.rindex(chr(10))]}\n")["f"].count("\n") == 120
    assert not mined(f"def f():\n    '{'word ' * 61}'{body}") and mined(f"def f():\n    '{'word ' * 60}'{body}")


@settings(deadline=None)
@given(st.text())
def test_first_paragraph_is_one_line_of_3_to_60_words(text):
    query = first_paragraph(text)
    assert query == "" or (query.isascii() and 3 <= len(query.split()) <= 60 and query == " ".join(query.split()))


# ---- files

BODY = '    """{}"""\n    x = 1\n    return x\n'

@pytest.fixture
def tree(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    write("pkg/b.py", "def b(y):\n" + BODY.format("Second in the order."))
    write("pkg/a.py", "def a(z):\n" + BODY.format("First in the order."))
    write("pkg/latin.py", "# -*- coding: latin-1 -*-\ndef c(q):\n    'Read a latin file.'\n    x = 'é'\n    return x\n".encode("latin-1"))
    write("pkg/bom.py", b"\xef\xbb\xbfdef d(r):\r\n    'Carriage returns and mark.'\r\n    x = '\xc3\xa9'\r\n    return x\r\n")
    write("pkg/feed.py", "def e(s):\n    'A form feed inside.'\n\x0c\n    x = '\x1c\u2028'\n    return x\n")
    write("module.py", "def m(t):\n" + BODY.format("A module at the top."))
    write("pkg/same_query.py", "def n(u):\n" + BODY.format("FIRST in the order"))
    write("pkg/same_code.py", "def b(y):\n" + BODY.format("Other words, same function."))
    write("tests/test_x.py", "def t(v):\n" + BODY.format("A test is left out."))
    write("pkg/_vendor/v.py", "def v(w):\n" + BODY.format("A copy is left out."))
    write(".hidden/h.py", "def h(w):\n" + BODY.format("Hidden files are out."))
    write("broken/syntax.py", "def f(:\n")
    write("broken/python2.py", "print 'hello'\n")
    write("broken/cookie.py", "# coding: no-such-codec\n")
    write("broken/bytes.py", b"x = '\xff\xfe'\n")
    write("broken/nul.py", b"x = 1\0\n")
    write("broken/deep.py", "x = " + "(" * 5000 + ")" * 5000 + "\n")
    write("broken/escape.py", "x = '\\d'\n")  # a warning, not an error
    (tmp_path / "broken" / "dangling.py").symlink_to("nowhere.py")
    return tmp_path


def test_a_folder(tree, recwarn):
    skipped = []
    rows = list(mine_functions(tree, skipped=skipped))
    assert [(row["file"], row["func"], row["package"]) for row in rows] == [
        ("module.py", "m", "module"), ("pkg/a.py", "a", "pkg"), ("pkg/b.py", "b", "pkg"), ("pkg/bom.py", "d", "pkg"), ("pkg/feed.py", "e", "pkg"),
        ("pkg/latin.py", "c", "pkg")]
    assert list(rows[0]) == ["query", "code", "package", "file", "func", "line"]
    assert [row["code"] for row in rows if row["func"] in "cde"] == [
        "def d(r):\n    x = 'é'\n    return x\n", "def e(s):\n    x = '\x1c\u2028'\n    return x\n", "def c(q):\n    x = 'é'\n    return x\n"]
    assert [line.split(":")[0] for line in skipped] == [f"broken/{name}.py" for name in "bytes cookie dangling deep nul python2 syntax".split()]
    assert not any(issubclass(w.category, (SyntaxWarning, DeprecationWarning)) for w in recwarn)
    assert rows == list(mine_functions(tree))


def test_a_list_of_files_in_any_order(tree):
    files = [tree / "pkg" / "b.py", tree / "pkg" / "a.py"]
    rows = list(mine_functions(files, package="mine"))
    assert [(row["file"], row["package"]) for row in rows] == [("a.py", "mine"), ("b.py", "mine")]
    assert [row["file"] for row in mine_functions(files, root=tree)] == ["pkg/a.py", "pkg/b.py"]
    assert list(mine_functions([])) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="not a folder; expected"): list(mine_functions(tmp_path / "absent"))


# ---- the standard library

@pytest.fixture(scope="module")
def stdlib():
    return stdlib_pairs()


def test_size_of_the_standard_library(stdlib):
    "3,708 on CPython 3.11.7; a figure for other versions can only be a range."
    assert len(stdlib) == 3708 if sys.version_info[:3] == (3, 11, 7) else 2500 < len(stdlib) < 5800
    assert len({row["package"] for row in stdlib}) > 100


def test_every_code_is_one_function_without_docstring(stdlib):
    for row in stdlib:
        function, = ast.parse(row["code"]).body
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and function.name == row["func"].split(".")[-1]
        assert ast.get_docstring(function) is None
        assert 3 <= row["code"].count("\n") <= 120 and row["query"] == first_paragraph(row["query"])
        assert not set(row["file"].split("/")) & {"test", "tests", "site-packages", "idlelib"} and row["file"].split("/")[0].removesuffix(".py") == row["package"]


def test_no_query_and_no_code_twice_and_rows_in_order(stdlib):
    for field in ("query", "code"): assert len({normalise(row[field]) for row in stdlib}) == len(stdlib)
    assert stdlib == sorted(stdlib, key=lambda row: (row["file"], row["line"]))


def test_code_is_the_function_in_the_file_and_query_its_docstring(stdlib):
    "The mined text parses to the tree in the file, less the docstring, wherever it stood and however it was indented."
    root = Path(sysconfig.get_path("stdlib"))
    for name in random.Random(0).sample(sorted({row["file"] for row in stdlib}), 80):
        there = {node.lineno: node for node in ast.walk(ast.parse((root / name).read_bytes())) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
        for row in (row for row in stdlib if row["file"] == name):
            node = there[row["line"]]
            assert ast.get_docstring(node).replace("\n", " ").split()[:3] == row["query"].split()[:3]
            node.body, node.decorator_list = node.body[1:], []
            while isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant) and isinstance(node.body[0].value.value, str):
                node.body = node.body[1:]
            assert ast.dump(ast.parse(row["code"]).body[0]) == ast.dump(node), (name, row["func"])


def test_mining_does_not_import_what_it_mines(tree):
    (tree / "pkg" / "danger.py").write_text("raise SystemExit\ndef z(o):\n" + BODY.format("Must not be run."))
    assert "z" in {row["func"] for row in mine_functions(tree)}
    assert not any("danger" in name for name in sys.modules)
