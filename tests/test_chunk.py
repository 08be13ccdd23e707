"Walking and chunking against git, Python's own parser and the text itself."
import ast
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proj.chunk import LANGUAGES, LIMIT, Unreadable, chunks, read_source, source_files, split_lines, walk
from proj.core import ConfigError, DataError


def write(folder, files: dict):
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Path(folder)


# ---- walking

@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    "A tree under git, in which only .gitignore files change."
    if not shutil.which("git"): pytest.skip("git is not installed; it is what .gitignore is compared with")
    folder = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", folder], check=True)
    return write(folder, {f"{base}{name}.c": "x" for base in ("", "a/", "b/", "a/b/", "a/b/a/", "ab/", "a b/") for name in ("a", "b", "ab", "a b", "#a", "!b")})


GLOB = st.lists(st.sampled_from(["a", "b", ".c", "*", "?", "**", "/", "/**", "**/", "[ab]", "[!a]", "[^b]", "[a-b]", "[[:alpha:]]", "\\", "!", "#", " ", "["]), max_size=6).map("".join)
GLOB = GLOB.filter(lambda glob: not re.search(r"[^/!]\*\*|\*\*[^/]|\\/", glob))  # git reads `a**/b` as `a`, then `**/b`, against its manual; nobody writes `\/`
GITIGNORE = st.tuples(st.lists(GLOB, max_size=4).map("\n".join), st.sampled_from(["\n", "\r\n"])).map(lambda v: v[0].replace("\n", v[1]) + v[1])


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(top=GITIGNORE, nested=GITIGNORE, deep=GITIGNORE)
def test_gitignore_means_what_git_says(repository, top, nested, deep):
    for folder, text in (("", top), ("a", nested), ("a/b", deep)): (repository / folder / ".gitignore").write_bytes(text.encode())
    listed = subprocess.run(["git", "ls-files", "-z", "--others", "--exclude-per-directory=.gitignore"], cwd=repository, capture_output=True, text=True, check=True)
    assert source_files(repository) == sorted(name for name in listed.stdout.split("\0") if name.endswith(".c"))


def test_what_is_skipped_is_counted(tmp_path):
    write(tmp_path, {"a.py": "x = 1", "big.js": "x" * 1_000_001, "b.c": b"\0", "c.c": b"\xff", "d.py": "# coding: no-such-coding\n", "e.py": "# coding: hex\n", "f.txt": "prose",
                     "node_modules/m.js": "x", "my-environment/pyvenv.cfg": "", "my-environment/lib/z.py": "x", "build/lib/a.py": "x", ".venv/a.py": "x", "pkg.egg-info/a.py": "x",
                     "venv/__init__.py": "x = 2", ".gitignore": "made/\n*.gen.c\n", "made/a.c": "x", "x.gen.c": "x", "line\nbreak.c": "x", "out.py": "x", "e.c": ""})
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    skipped = Counter()
    assert [source.path for source in walk(tmp_path, exclude=["/out.*"], skipped=skipped)] == ["a.py", "e.c", "venv/__init__.py"]
    assert skipped == {"larger than 1,000,000 bytes": 1, "binary": 1, "not UTF-8": 3, "folder of a tool": 5, "in .gitignore": 2, "name that cannot be printed": 1, "link": 2, "excluded": 1}


def test_two_folders_that_link_to_each_other(tmp_path):
    write(tmp_path, {"a/x.py": "1", "b/y.py": "2"})
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    assert source_files(tmp_path) == ["a/x.py", "b/y.py"]
    (tmp_path / "root").symlink_to(tmp_path / "a")
    assert source_files(tmp_path / "root") == ["x.py"], "the root itself may be a link"


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may read everything")
def test_no_permission(tmp_path):
    write(tmp_path, {"a.py": "x", "b.py": "x", "closed/c.py": "x"})
    (tmp_path / "b.py").chmod(0), (tmp_path / "closed").chmod(0)
    skipped = Counter()
    try: assert [source.path for source in walk(tmp_path, skipped=skipped)] == ["a.py"]
    finally: (tmp_path / "closed").chmod(0o700)
    assert skipped == {"permission denied": 1, "folder without permission": 1}


@pytest.mark.parametrize("data, text", [("é = 1\n".encode(), "é = 1\n"), (b"\xef\xbb\xbfx = 1\r\n", "x = 1\r\n"), ("# coding: latin-1\nx = 'é'".encode("latin-1"), "# coding: latin-1\nx = 'é'"), (b"", "")])
def test_reading(tmp_path, data, text):
    (tmp_path / "a.py").write_bytes(data)
    assert read_source(tmp_path / "a.py") == (data, text)


def test_reading_what_makes_no_text(tmp_path):
    (tmp_path / "a.py").write_bytes(b"# coding: utf-7\nx = '+2AA-'\n")  # a lone surrogate
    with pytest.raises(Unreadable, match="not UTF-8"): read_source(tmp_path / "a.py")
    with pytest.raises(Unreadable, match="no such file"): read_source(tmp_path / "b.py")


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(DataError, match="no such folder"): list(walk(tmp_path / "none"))


def test_languages():
    assert len(LANGUAGES) >= 22 and {"python", "c", "c++", "go", "rust", "java", "javascript", "typescript", "shell", "sql"} <= set(LANGUAGES.values())


# ---- chunking

def is_piece(chunk) -> bool: return "#" in chunk.id.rpartition(":")[2]


def check(text: str, path: str, language: str, limit: int = LIMIT):
    "What holds for every text: nothing is lost, doubled or moved; no chunk is over the limit; ids and lines are true."
    found, lines = chunks(text, path, language, limit), split_lines(text)
    assert "".join("".join(chunk.text.split()) for chunk in found) == "".join(text.split())
    assert len({chunk.id for chunk in found}) == len(found)
    covered = Counter()
    for chunk in found:
        assert 0 < len(chunk.text.encode()) <= limit and chunk.text.strip()
        assert (chunk.path, chunk.language) == (path, language) and chunk.kind in ("function", "class", "module", "lines")
        whole = "".join(lines[chunk.start - 1:chunk.end]).rstrip("\r\n")
        if is_piece(chunk):
            assert chunk.text in whole and chunk.start == chunk.end and len(whole.encode()) > limit
            assert chunk.id.startswith(f"{path}:{chunk.start}-{chunk.end}#")
        else:
            assert chunk.text == whole and chunk.id == f"{path}:{chunk.start}-{chunk.end}"
            covered.update(range(chunk.start, chunk.end + 1))
    cut = {chunk.start for chunk in found if is_piece(chunk)}
    assert not cut & set(covered) and (not covered or max(covered.values()) == 1)
    assert {n for n, line in enumerate(lines, 1) if line.strip()} <= cut | set(covered)
    return found


SEPARATOR = st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\n\f\n", "\n\t\n"])
PIECE = st.sampled_from(["x", " ", "\t", "\f", "\v", "\u2028", "\x85", "\ufeff", "é", "e\u0301", "👩‍👩‍👧", "漢字", "}", "{", "# c", "def f(): pass", "class A:", "    ", "'", '"""', "\\", "@d"])
LINE = st.one_of(st.text(max_size=30), st.lists(PIECE, max_size=8).map("".join), st.tuples(PIECE, st.integers(1, 200)).map(lambda v: v[0] * v[1]))
TEXT = st.lists(st.tuples(LINE, SEPARATOR).map("".join), max_size=25).map("".join).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


@settings(max_examples=300, deadline=None)
@given(TEXT, st.sampled_from(["python", "c"]), st.sampled_from([64, 65, 100, LIMIT]))
def test_any_text(text, language, limit): check(text, "a b:c#1.py", language, limit)


def indented(lines): return ["    " + line for line in lines]


LEAF = st.lists(st.sampled_from(["pass", "x = 1", "# a comment", "", "x = [1,\n# within brackets\n2]", 's = """\n# no comment\n"""', 'f"""{1}\n# no comment"""', "x = 'é' * 3", "\f", "y = 1; z = 2"]),
                min_size=1, max_size=4).map(lambda lines: ["pass", *lines])
BLOCK = st.recursive(LEAF, lambda body: st.lists(st.tuples(st.sampled_from([["def f(a, b=1):"], ["@d", "# between", "@e(1,", "   2)", "async def f():"], ["# above", "class A:"], ["if a:"],
                     ["try:", "    import a", "except ImportError:"], ["", "# apart", "", "with a:"]]), body).map(lambda v: [*v[0], *indented(v[1])]), min_size=1, max_size=4)
                     .map(lambda parts: [line for part in parts for line in part]), max_leaves=12)


@settings(max_examples=200, deadline=None)
@given(BLOCK, st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from([64, 200, LIMIT]), st.booleans())
def test_any_python(lines, end, limit, last_end):
    text = "\n".join(lines).replace("\n", end) + end * last_end
    tree = ast.parse(text)
    found = check(text, "a.py", "python", limit)
    assert all(chunk.kind != "lines" for chunk in found)
    if limit < LIMIT: return
    for node in tree.body:  # what fits is one chunk, with its decorators and the comments above
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): continue
        chunk, = [chunk for chunk in found if chunk.start <= node.lineno <= chunk.end]
        assert chunk.end <= node.end_lineno and chunk.kind == ("class" if isinstance(node, ast.ClassDef) else "function")
        ast.parse(chunk.text)
        assert chunk.text.lstrip().startswith(("def", "@", "#", "class", "async"))


def test_a_long_class_is_cut_at_its_methods_and_a_long_function_at_its_inner_ones():
    method = "    # Adds.\n    @staticmethod\n    def f{0}(a):\n        {1}\n        return a\n\n"
    text = "class Long:\n    'What it is.'\n    size = 3\n\n" + "".join(method.format(i, "a += 1; " * 30 + "a += 1") for i in range(12))
    found = check(text, "a.py", "python")
    assert [chunk.kind for chunk in found] == ["class"] + 12 * ["function"]
    assert all(chunk.text.startswith("    # Adds.\n    @staticmethod\n    def") for chunk in found[1:])
    inner = "def outer():\n    x = 1\n\n" + "".join(f"    def g{i}():\n        return {'1 + ' * 200}1\n\n" for i in range(3)) + "    return g1, g2\n"
    assert [(chunk.start, chunk.end, chunk.kind) for chunk in check(inner, "a.py", "python")] == [(1, 2, "function"), (4, 5, "function"), (7, 8, "function"), (10, 11, "function"), (13, 13, "function")]


def test_comments_belong_to_what_follows_unless_they_are_the_end_of_a_string():
    text = 'x = 1\n\n# ---- part\n\n# What f does.\ndef f(): pass\ny = """\n# text"""\ndef g(): pass\nif """\n# text""":\n    # h\n    def h(): pass\n# the end\n'
    assert [(chunk.start, chunk.end, chunk.kind) for chunk in check(text, "a.py", "python")] == [
        (1, 1, "module"), (3, 6, "function"), (7, 8, "module"), (9, 9, "function"), (10, 11, "module"), (12, 13, "function"), (14, 14, "module")]


def test_what_python_cannot_parse_is_packed_by_lines():
    for text in ("def broken(:\n    pass\n", "print 'two'\n", "x = " + "(" * 400 + ")" * 400, "def f():\n\tx\n        y\n", "\0"):
        assert {chunk.kind for chunk in check(text, "a.py", "python")} == {"lines"}


def test_a_long_chain_of_branches_does_not_exhaust_the_stack():
    chain = "if a == 0: pass\n" + "".join(f"elif a == {i}: pass\n" for i in range(1, 900)) + "def f(): pass\n"
    assert check(chain, "a.py", "python")
    check("x = " + "-" * 50_000 + "1\n", "a.py", "python")
    check("if a: pass\n" + "elif a: pass\n" * 20_000, "a.py", "python")


def test_long_lines_are_cut_between_characters():
    text = "let a = '" + "👩‍👩‍👧é漢" * 1_000 + "';\r\nlet b = 1;\r\n"
    found = check(text, "a.js", "javascript")
    assert "".join(chunk.text for chunk in found[:-1]) + "\r\n" == split_lines(text)[0] and found[-1].id == "a.js:2-2"
    assert [chunk.id for chunk in check("x" * LIMIT + "\r\n", "a.js", "javascript")] == ["a.js:1-1"], "a line end does not count"
    assert len(check("x" + " " * 10_000 + "y\n", "a.js", "javascript")) == 2, "a piece without anything to read is left out"


def test_cuts_of_other_languages_fall_between_definitions():
    function = "int f{0}(int x) {{\n" + "    x += {0};\n" * 20 + "    return x;\n}}\n\n"
    found = check("".join(function.format(i) for i in range(30)), "a.c", "c")
    assert len(found) > 3 and all(chunk.text.startswith("int f") and chunk.text.endswith("}") for chunk in found)


def test_a_limit_that_holds_nothing():
    with pytest.raises(ConfigError, match="at least 64"): chunks("x", "a.py", "python", 3)


def test_real_files():
    "Packages of the standard library and this repository's own code: all hold, and all of Python is cut by its syntax."
    kinds = Counter()
    for folder in ("asyncio", "email", "json", "encodings", "lib2to3"):
        for source in walk(Path(sysconfig.get_path("stdlib"), folder)): kinds.update(chunk.kind for chunk in check(source.text, source.path, source.language))
    for source in walk(Path(__file__).parent.parent): kinds.update(chunk.kind for chunk in check(source.text, source.path, source.language))
    assert kinds["function"] > 1_000 and kinds["class"] > 100 and kinds["module"] > 100
