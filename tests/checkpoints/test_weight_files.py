"""Tensors of any weight file: nothing of it runs, damage and wrong kinds are named, time and memory are bounded."""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import copyreg
import functools
import io
import json
import operator
import os
import pickle
import runpy
import struct
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors as safetensors_package
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from vae3d import weight_files
from vae3d.io import FileError
from vae3d.weight_files import open_tensors, read_tensors

LEGACY = {"_use_new_zipfile_serialization": False}
FORMATS = [{}, LEGACY]


class ModelCheckpoint:
    """Stands for lightning.pytorch.callbacks.ModelCheckpoint; a class that no longer exists when the file is read."""

    def __init__(self) -> None:
        self.best_model_score = torch.tensor(0.5)
        self.dirpath = Path("/somewhere")


def lightning(state: dict) -> dict:
    """What a Lightning or CompVis .ckpt holds besides its state dict."""
    average = collections.OrderedDict(w=torch.ones(2))
    return {
        "epoch": 3,
        "global_step": np.int64(7),
        "pytorch-lightning_version": "2.1.0",
        "callbacks": {
            ModelCheckpoint: {"best": np.float32(0.5)},
            "ModelCheckpoint{'monitor': 'val'}": ModelCheckpoint(),
        },
        "hyper_parameters": argparse.Namespace(lr=1e-3, config=OmegaConf.create({"a": [1, {"b": 2}]})),
        "loops": {"deque": collections.deque([1, 2]), "set": {1, 2}, "frozen": frozenset([3]), "complex": 1j},
        "rng": np.random.default_rng(0).bytes(4),
        "ema": functools.partial(print, average),
        "state_dict": state,
    }


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    whole = torch.randn(4, 6)
    return {
        "plain": whole,
        "part": whole[1:3, ::2],
        "turned": torch.randn(3, 5).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).half(),
        "bf16": torch.randn(3).bfloat16(),
        "fp8": torch.randn(3).to(torch.float8_e4m3fn),
        "u16": torch.tensor([1, 2, 60000], dtype=torch.uint16),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "expanded": torch.ones(1).expand(7),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], prefix: str = "") -> None:
    for name, tensor in expected.items():
        read = found[prefix + name]
        assert read.dtype == tensor.dtype, name
        assert read.shape == tensor.shape, name
        assert torch.equal(
            read.contiguous().view(-1).view(torch.uint8), tensor.detach().contiguous().view(-1).view(torch.uint8)
        )


@pytest.mark.parametrize("how", FORMATS, ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_come_back_bit_equal_whatever_objects_lie_beside_them(tmp_path, monkeypatch, how, protocol):
    state = some_tensors()
    torch.save(lightning(state), tmp_path / "last.ckpt", pickle_protocol=protocol, **how)
    monkeypatch.delitem(globals(), "ModelCheckpoint")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_same(read_tensors(tmp_path / "last.ckpt"), state, "state_dict.")


def test_a_state_dict_with_its_metadata_comes_back_in_order(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    for number, how in enumerate(FORMATS):
        torch.save(network.state_dict(), tmp_path / f"{number}.pt", **how)
        found = read_tensors(tmp_path / f"{number}.pt")
        assert list(found) == list(network.state_dict())
        assert_same(found, network.state_dict())


# Nothing of a file runs


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments, state=None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced

    def __call__(self) -> None:
        """Not called: pickle wants a function to be callable."""


def payloads(sentinel: Path) -> dict[str, object]:
    touch = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w')"
    chain = Calls(getattr, Calls(__import__, "os"), "system")
    return {
        "system": Calls(os.system, touch),
        "popen": Calls(subprocess.Popen, ["touch", str(sentinel)]),
        "check_call": Calls(subprocess.check_call, ["touch", str(sentinel)]),
        "eval": Calls(builtins.eval, code),
        "exec": Calls(builtins.exec, code),
        "open": Calls(builtins.open, str(sentinel), "w"),
        "getattr": Calls(Calls(getattr, Calls(__import__, "os"), "mknod"), str(sentinel)),
        "chain": Calls(chain, touch),
        "attrgetter": Calls(operator.attrgetter("mknod"), Calls(__import__, "os")),
        "methodcaller": Calls(operator.methodcaller("touch"), Path(sentinel)),
        "partial": Calls(functools.partial(os.system, touch)),
        "reduce": Calls(functools.reduce, os.system, [touch]),
        "map": Calls(list, Calls(map, os.system, [touch])),
        "copyreg": Calls(copyreg._reconstructor, subprocess.Popen, object, None),
        "touch": Calls(Path.touch, Path(sentinel)),
        "torch_load": Calls(torch.load, str(sentinel)),
        "torch_save": Calls(torch.save, {}, str(sentinel)),
        "hub": Calls(torch.hub.load, str(sentinel.parent), "x"),
        "exec_file": Calls(runpy.run_path, str(sentinel)),
        "from_file": Calls(torch.UntypedStorage.from_file, str(sentinel), True, 16),
        "rebuild": Calls(torch._utils._rebuild_tensor_v2, Calls(os.system, touch), 0, (1,), (1,), False, {}),
        "rebuild_type": Calls(torch._tensor._rebuild_from_type_v2, os.system, str, (touch,), {}),
        "state": Calls(collections.OrderedDict, state={"__class__": Calls(os.system, touch)}),
        "ordered": Calls(collections.OrderedDict, [[Calls(os.system, touch), 1]]),
        "default": Calls(collections.defaultdict, Calls(functools.partial, os.system, touch)),
        "nested": [{"a": (Calls(os.system, touch), {"b": [Calls(os.system, touch)]})}],
        "numpy": Calls(np.load, str(sentinel), None, True),
        "tofile": Calls(np.ndarray.tofile, np.zeros(2), str(sentinel)),
    }


@pytest.mark.smoke
@pytest.mark.parametrize("how", FORMATS, ids=["zip", "legacy"])
def test_no_payload_of_a_pickle_runs(tmp_path, how):
    sentinel, good = tmp_path / "PWNED", {"w": torch.arange(3.0)}
    for name, payload in payloads(sentinel).items():
        file = tmp_path / f"{name}.ckpt"
        torch.save({"first": payload, "state_dict": good, "last": payload}, file, **how)
        assert torch.equal(read_tensors(file)["state_dict.w"], good["w"]), name
        assert not sentinel.exists(), name


OPCODES = {
    "global": b"cos\nsystem\n(S'touch PWNED'\ntR.",
    "inst": b"(S'touch PWNED'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch PWNED'\no.",
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch PWNED\x85R.",
    "newobj": b"\x80\x02csubprocess\nPopen\n]\x8c\x05touchaX\x05\x00\x00\x00PWNEDa\x85\x81.",
    "newobj_ex": b"\x80\x04csubprocess\nPopen\n)}\x92.",
    "build": b"\x80\x02cos\nsystem\n}U\x08__call__U\x01xsb.",
    "persid": b"Pos.system\n.",
    "binpersid": b"\x80\x02(U\x07storagecos\nsystem\nU\x010U\x03cpuK\x01tQ.",
    "ext": b"\x80\x02\x82\x01.",
    "buffer": b"\x80\x05\x97\x98.",
    "module": b"\x80\x02ctorch\nload\nU\x05PWNED\x85R.",
}


@pytest.mark.parametrize("name", OPCODES)
def test_no_operation_of_a_pickle_runs_anything(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("x.pt").write_bytes(archive(OPCODES[name]))
    with contextlib.suppress(FileError):  # some are not whole
        assert open_tensors("x.pt") == {}
    assert os.listdir(".") == ["x.pt"]


# Damaged and hostile files


def archive(pickled: bytes, entries: dict[str, bytes] | None = None, **how: object) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **how) as file:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", **(entries or {})}.items():
            file.writestr(f"archive/{name}", content)
    return stream.getvalue()


def tensor_of(size: object, stride: object, offset: object = 0, numel: object = 4) -> bytes:
    """The pickle of {"w": tensor} with any numbers."""
    out = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if obj is Ellipsis else None

    tensor = Calls(torch._utils._rebuild_tensor_v2, Ellipsis, offset, size, stride, False, collections.OrderedDict())
    Pickler(out, 2).dump({"w": tensor})
    return out.getvalue()


def safetensors(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def whole(**how: object) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.arange(100.0), "v": torch.ones(3)}, stream, **how)
    return stream.getvalue()


def repeated(operations: bytes, count: int) -> bytes:
    """The pickle of {} after OrderedDict was called `count` times, with what these operations push: 1 is a list of
    100,000 pairs."""
    pairs = b"K\x01K\x02\x86q\x000]q\x01(" + b"h\x00" * 100_000 + b"e0"
    return b"\x80\x02" + pairs + b"ccollections\nOrderedDict\nq\x02" + (b"0h\x02" + operations + b"R") * count + b"0}."


STORAGE = {"data/0": b"\0" * 16}
NESTED = b"]q\x00" + b"".join(b"0]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60))  # of 2**60 lists if spelled out
LARGE = b"\x8b" + struct.pack("<I", 4000) + b"\x11" * 4000  # an integer of more digits than Python prints
DAMAGED = {
    "empty": (b"", "is empty"),
    "zeros": (b"\0" * 100, "interrupted download"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer.*git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html>", "is a web page.*/resolve/"),
    "json": (b'{"error": "Repository not found"}', "is a JSON text, not weights"),
    "json list": (b"[]", "is a JSON text, not weights"),
    "json cut": (b'{"weight_map": ', "is not JSON"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", "is a gzip archive"),
    "text": (b"hello", "is no weight file.*hello"),
    "numpy": (b"\x93NUMPY\x01\0", "is a numpy array"),
    "tar": (b"a" * 257 + b"ustar" + b"\0" * 250, "is a tar archive"),
    "pickle": (pickle.dumps({"a": 1}), "pickle that torch.save did not write"),
    "zip of files": (archive(b".").replace(b"data.pkl", b"data.txt"), "zip archive of other files"),
    "TorchScript": (archive(b".", {"constants.pkl": b"."}), "TorchScript"),
    "big-endian": (archive(b"}.", {"byteorder": b"big"}), "big-endian"),
    "compressed": (archive(b"}" * 99, compression=zipfile.ZIP_DEFLATED), "compressed"),
    "no end": (archive(b"}"), "damaged"),
    "no stack": (archive(b"s."), "damaged"),
    "no memo": (archive(b"h\x05."), "damaged"),
    "no mark": (archive(b"}u."), "damaged"),
    "odd items": (archive(b"}(K\x01u."), "damaged"),
    "unknown operation": (archive(b"\xff."), "damaged"),
    "huge text": (archive(b"\x8d" + b"\xff" * 7 + b"\x7f."), "damaged"),
    "huge memo": (archive(b"}r\xff\xff\xff\x7f."), None),
    "many operations": (archive(b"N" * 1_400_000 + b"."), "operations"),
    "lists in a class name": (archive(b"\x80\x04}" + NESTED + b"X\1\0\0\0x\x930."), None),
    "lists for a storage": (archive(b"\x80\x02(U\7storagectorch\nFloatStorage\n" + NESTED + b"U\3cpuK\1tQ."), "storage"),
    "lists for an offset": (archive(tensor_of((4,), (1,), [])[:-1].replace(b"]", NESTED) + b"."), "offset"),
    "large key": (archive(b"\x80\x02}" + LARGE + b"}s."), None),
    "long arguments": (archive(repeated(b"h\x01", 20_000)), None),
    "long list of pairs": (archive(repeated(b"h\x01\x85", 20_000)), None),
    "no type": (archive(b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n((U\7storagectorch\nFloatStorage\nU\0010U\3cpuK\4tQ"
                        b"K\0K\4\x85K\1\x85\x89NK\5tR0}."), None),
    "sizes of a dict": (archive(tensor_of({4: 1}, {1: 1}), STORAGE), "size"),
    "long names": (
        archive(b"\x80\x02}X\x10\x27\0\0" + b"k" * 10_000 + b"q\x00" + b"}h\x00" * 20_000
                + tensor_of((4,), (1,))[2:-1] + b"s" * 20_001 + b".", STORAGE), "characters",
    ),
    "many long names": (
        archive(b"\x80\x02}X\xa0\x0f\0\0" + b"k" * 4000 + b"](" + tensor_of((4,), (1,))[13:-2] + b"q\xff"
                + b"h\xff" * 5000 + b"es.", STORAGE), "names",
    ),
    "no storage": (archive(tensor_of((4,), (1,))), "storage '0' is missing"),
    "short storage": (archive(tensor_of((4,), (1,), 0, 5), STORAGE), "too short"),
    "large tensor": (archive(tensor_of((5,), (1,)), STORAGE), "does not fit its storage"),
    "far offset": (archive(tensor_of((1,), (1,), 2**62), STORAGE), "does not fit its storage"),
    "negative": (archive(tensor_of((1,), (-1,)), STORAGE), "stride"),
    "expanded": (archive(tensor_of((2**40,), (0,)), STORAGE), "does not fit its storage"),
    "empty but huge": (archive(tensor_of((0, 2**62), (1, 1)), STORAGE), "does not fit its storage"),
    "sizes of text": (archive(tensor_of(("a",), (1,)), STORAGE), "size"),
    "no sizes": (archive(tensor_of(None, None), STORAGE), "damaged"),
    "many elements": (archive(tensor_of((1,), (1,), 0, 10**30), STORAGE), "elements"),
    "safetensors cut": (safetensors({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}), "damaged or incomplete"),
    "safetensors header cut": (struct.pack("<Q", 2**40) + b'{"w"', "cut short"),
    "safetensors header": (safetensors(b"{not json}"), "damaged or incomplete"),
    "safetensors shape": (safetensors({"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}}, b"\0" * 16), "damaged"),
    "safetensors type": (safetensors({"w": {"dtype": "X", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16), "damaged"),
    "safetensors overlap": (
        safetensors({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}, b"\0" * 4), "damaged",
    ),
    "safetensors of half bytes": (
        safetensors({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"\0" * 2), "float4",
    ),
    "safetensors size": (safetensors({"w": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}), "w has a shape"),
    "safetensors dimensions": (safetensors({"w": {"dtype": "F32", "shape": [0] * 65, "data_offsets": [0, 0]}}), "w has a shape"),
    "safetensors nested": (safetensors(b'{"a":' + b"[" * 100_000), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_each_wrong_file_gets_one_error_soon(tmp_path, name):
    content, message = DAMAGED[name]
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    start = time.process_time()  # of a busy machine as of an idle one
    if message is None:
        assert read_tensors(file) == {}
    else:
        with pytest.raises(FileError, match=message) as error:
            read_tensors(file)
        assert str(file) in str(error.value)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("how", FORMATS, ids=["zip", "legacy"])
def test_a_file_cut_anywhere_or_with_a_flipped_bit_is_refused_or_unchanged(tmp_path, how):
    content, file = whole(**how), tmp_path / "w.pt"
    expected = torch.arange(100.0)
    for length in range(0, len(content), 23):
        file.write_bytes(content[:length])
        with pytest.raises(FileError):
            read_tensors(file)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(content), 150):
        broken = bytearray(content)
        broken[position] ^= 1 << rng.integers(8)
        file.write_bytes(broken)
        try:
            found = read_tensors(file)
        except FileError:
            continue
        if not how and "w" in found:  # which has checksums
            assert torch.equal(found["w"], expected)


def test_tensors_are_mapped_and_neither_replacing_the_file_nor_writing_to_them_does_harm(tmp_path):
    file, w = tmp_path / "w.pt", torch.randn(100, 100)
    torch.save({"w": w}, file)
    content = file.read_bytes()
    found = read_tensors(file)["w"]
    if (maps := Path("/proc/self/maps")).exists():
        assert str(file) in maps.read_text()
    found[0, 0] = 7.0
    assert file.read_bytes() == content
    torch.save({"w": torch.zeros(100, 100)}, tmp_path / "other.pt")
    (tmp_path / "other.pt").replace(file)
    assert torch.equal(found[1:], w[1:])
    file.unlink()
    assert torch.equal(found[1:], w[1:])


def test_a_file_that_cannot_be_mapped_is_read(tmp_path, monkeypatch):
    w = torch.randn(10)
    torch.save({"w": w}, tmp_path / "w.pt")

    def fails(*_, **__):
        raise OSError("No such device")

    monkeypatch.setattr(weight_files.mmap, "mmap", fails)
    assert torch.equal(read_tensors(tmp_path / "w.pt")["w"], w)


def test_containers_in_themselves_and_shared_ones_end(tmp_path):
    state = {"w": torch.ones(2)}
    state["self"] = state
    shared: list = [state]
    for _ in range(60):
        shared = [shared, shared]
    torch.save({"loop": state, "shared": shared}, tmp_path / "w.pt")
    assert list(open_tensors(tmp_path / "w.pt")) == ["loop.w"]


def test_a_tensor_is_read_only_when_it_is_asked_for(tmp_path, monkeypatch):
    torch.save({"large": torch.zeros(1000), "small": torch.ones(2)}, tmp_path / "w.pt")
    tensors = open_tensors(tmp_path / "w.pt")
    read, read_bytes = [], weight_files._read_bytes
    monkeypatch.setattr(weight_files, "_read_bytes", lambda *args: read.append(args[2]) or read_bytes(*args))
    tensors["small"].read()
    assert read == [30]  # the header of its entry; the tensor is mapped


def test_the_format_is_recognised_by_content_not_by_name(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "weights.pth")
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "weights.sft")
    for name in ("weights.pth", "weights.safetensors", "weights.sft"):
        assert torch.equal(read_tensors(tmp_path / name)["w"], torch.ones(2))


# Indexes


def index(folder: Path, places: dict[str, str], name: str = "model.safetensors.index.json") -> Path:
    file = folder / name
    file.write_text(json.dumps({"weight_map": places}))
    return file


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_gives_the_tensors_of_all_its_files(tmp_path, suffix):
    for number in "12":
        write = save_file if suffix == ".safetensors" else torch.save
        write({f"w{number}": torch.full((2,), float(number))}, tmp_path / f"part-{number}{suffix}")
    file = index(tmp_path, {"w1": f"part-1{suffix}", "w2": f"part-2{suffix}"}, f"model{suffix}.index.json")
    assert {name: tensor[0].item() for name, tensor in read_tensors(file).items()} == {"w1": 1, "w2": 2}


def test_an_index_in_a_hugging_face_cache_consists_of_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, blobs / "0")
    index(blobs, {"w": "part.safetensors"}, "1")
    for name, blob in (("part.safetensors", "0"), ("model.safetensors.index.json", "1")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    assert list(read_tensors(snapshot / "model.safetensors.index.json")) == ["w"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../other.safetensors", "only names of other files in the same folder"),
        ("/etc/passwd", "only names of other files"),
        ("sub/x.safetensors", "only names of other files"),
        ("..", "only names of other files"),
        ("", "only names of other files"),
        ("a\0b", "only names of other files"),
        ("model.safetensors.index.json", "only names of other files"),
        ("other.index.json", "is a JSON text"),
        ("link.safetensors", "is a link out of the folder"),
        ("absent.safetensors", "1 of its 1 files .*: absent.safetensors"),
        ("part.safetensors", "1 tensor in none of its files: w"),
        ("folder", "1 of its 1 files .*: folder"),
    ],
)
def test_an_index_cannot_leave_its_folder_or_name_itself(tmp_path, name, message):
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    save_file({"v": torch.ones(1)}, folder / "part.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "other.safetensors")
    index(folder, {"w": "model.safetensors.index.json"}, "other.index.json")
    with pytest.raises(FileError, match=message):
        read_tensors(index(folder, {"w": name}))


@pytest.mark.parametrize("content", [{"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"a": 1}])
def test_an_index_of_another_shape_is_named(tmp_path, content):
    (tmp_path / "i.json").write_text(json.dumps(content))
    with pytest.raises(FileError, match="no index of weight files"):
        read_tensors(tmp_path / "i.json")


def test_tensors_that_share_their_bytes_cannot_fill_the_memory(tmp_path):
    whole = torch.zeros(2**18)
    torch.save({str(i): whole[i:] for i in range(200)}, tmp_path / "bomb.pt")
    with pytest.raises(FileError, match="elements"):
        open_tensors(tmp_path / "bomb.pt")
    torch.save({str(i): whole for i in range(20)}, tmp_path / "tied.pt")
    assert len(open_tensors(tmp_path / "tied.pt")) == 20


def test_a_file_or_an_index_of_very_many_parts_is_refused_soon(tmp_path):
    header = {str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(70_000)}
    (tmp_path / "x.safetensors").write_bytes(safetensors(header))
    with pytest.raises(FileError, match="70,000 tensors"):
        open_tensors(tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="names 5000 files"):
        open_tensors(index(tmp_path, {str(i): f"{i}.safetensors" for i in range(5000)}))


@pytest.mark.parametrize("name", ["\ud800.safetensors", "a\n.safetensors", "loop.safetensors"])
def test_names_in_an_index_that_no_file_can_have_are_refused(tmp_path, name):
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(FileError, match=r"index\.json"):
        open_tensors(index(tmp_path, {"w": name}))


def test_a_part_that_no_memory_holds_is_named(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(2)}, file)

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(safetensors_package, "safe_open", no_memory)
    with pytest.raises(FileError, match=r"x\.safetensors.*memory"):
        open_tensors(file)
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    monkeypatch.setattr(weight_files, "bytearray", no_memory, raising=False)
    with pytest.raises(FileError, match=r"x\.pt.*memory"):
        read_tensors(tmp_path / "x.pt")
