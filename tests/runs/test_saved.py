"""Files that are read back: what is damaged is one sentence with file, key and what to do."""

import dataclasses

import pytest

from alignx_jax.exits import UserError
from alignx_jax.runs import saved


@dataclasses.dataclass
class Kind:
    count: int
    names: list[str]


def test_what_is_whole_is_read_with_all_that_is_in_it(tmp_path):
    (tmp_path / "a.json").write_text('{"count": 2, "names": ["x"], "more": [1]}')
    assert saved.read(tmp_path / "a.json", Kind, "") == {"count": 2, "names": ["x"], "more": [1]}


@pytest.mark.parametrize(
    "content, what",
    [
        (b'{"count": 2}', r"damaged \(names: Field required\)"),
        (b'{"counu": 2, "names": []}', r"damaged \(count: Field required\)"),
        (b'{"count": "2", "names": []}', r"damaged \(count: .*integer\)"),
        (b'{"count": 2, "names": [3]}', r"damaged \(names.0: .*string\)"),
        (b"[]", r"damaged \(.*object.*\)"),
        (b"\xff", r"damaged \(.*\)"),
        (b'{"count"', r"damaged \(.*\)"),
        (b"[" * 100_000, r"damaged \(.*\)"),
        (None, "missing"),
    ],
)
def test_what_is_damaged_is_one_sentence(tmp_path, content, what):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path / 'a.json'} is {what}; write it again$"):
        saved.read(tmp_path / "a.json", Kind, "write it again")
