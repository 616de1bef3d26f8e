"""Start weights of the tag classifier: MXNet's published file, safetensors, state dicts, and what is refused."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.methods.dcam import mxnet_params
from nnunet_dgplugins.methods.dcam.checkpoint import load_classifier_weights
from nnunet_dgplugins.methods.dcam.mxnet_params import V1, V2, V3, convert_params, read_params
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38
from nnunet_dgplugins.methods.safe_loading import read_state_dict

CODES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}
OLD = 0


def array_bytes(values: np.ndarray, version: int = V2, storage: int = 0) -> bytes:
    """One array as MXNet writes it; ``OLD`` is the form before V1."""
    if version == OLD:
        head = struct.pack(f"<I{values.ndim}I", values.ndim, *values.shape)
    else:
        head = struct.pack("<I", version)
        if version in (V2, V3):
            head += struct.pack("<i", storage)
        head += struct.pack(f"<i{values.ndim}q", values.ndim, *values.shape)
    return head + struct.pack("<iii", 1, 0, CODES[values.dtype.name]) + values.tobytes()


def params_bytes(arrays: dict[str, np.ndarray], version: int = V2, **options) -> bytes:
    """A whole ``.params`` file by the definition of the format."""
    out = struct.pack("<QQQ", 0x112, 0, len(arrays))
    out += b"".join(array_bytes(values, version, **options) for values in arrays.values())
    out += struct.pack("<Q", len(arrays))
    return out + b"".join(struct.pack("<Q", len(name.encode())) + name.encode() for name in arrays)


def published_name(key: str) -> str:
    """The published file's name of one of our tensors: b4_3.bn_branch2a.weight is arg:bn4b3_branch2a_gamma."""
    last = {"bias": "beta", "weight": "gamma", "running_mean": "moving_mean", "running_var": "moving_var"}
    place, *rest = key.split(".")
    if place == "conv1a":
        return "arg:conv1a_weight"
    if place == "bn7":
        return f"{'aux' if 'running' in key else 'arg'}:bn7_{last[rest[0]]}"
    stage, _, unit = place[1:].partition("_")
    unit = f"b{unit}" if unit else "a"
    kind, branch = rest[0].split("_")
    if kind == "conv":
        return f"arg:res{stage}{unit}_{branch}_weight"
    return f"{'aux' if 'running' in key else 'arg'}:bn{stage}{unit}_{branch}_{last[rest[1]]}"


def thin(seed: int = 0, mode: str = "instance") -> ResNet38:
    torch.manual_seed(seed)
    network = ResNet38(3, width_divisor=32, pcnorm=mode)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.normal_()
    return network


def backbone(network: ResNet38) -> dict[str, torch.Tensor]:
    """What the published file holds of the network."""
    skipped = re.compile(r"(fc8|bn2|bn3|bn4)\..*|.*num_batches_tracked")
    return {key: value for key, value in network.state_dict().items() if not skipped.fullmatch(key)}


def published(network: ResNet38) -> dict[str, np.ndarray]:
    arrays = {published_name(key): value.numpy() for key, value in backbone(network).items()}
    return {**arrays, "arg:linear1000_weight": np.ones((10, 128), np.float32), "arg:linear1000_bias": np.ones(10, "f4")}


@pytest.mark.parametrize("version", [V1, V2, V3, OLD], ids=["V1", "V2", "V3", "old"])
def test_arrays_of_every_version_and_type_are_read_back(tmp_path, version):
    generator = np.random.default_rng(0)
    arrays = {f"arg:{name}": (100 * generator.random((2, 3))).astype(name) for name in CODES}
    arrays["aux:vector"] = generator.random(5).astype(np.float32)
    (tmp_path / "a.params").write_bytes(params_bytes(arrays, version))
    found = read_params(tmp_path / "a.params")
    assert list(found) == list(arrays)
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


def test_a_number_of_no_dimension_is_read_where_the_format_knows_it(tmp_path):
    number = np.array(7, np.int64)
    (tmp_path / "new.params").write_bytes(params_bytes({"arg:x": number}, V3))
    assert read_params(tmp_path / "new.params")["arg:x"] == 7
    (tmp_path / "old.params").write_bytes(params_bytes({"arg:x": number}, V2))
    with pytest.raises(BadInput, match="array 1 of 1 has 0 dimensions"):
        read_params(tmp_path / "old.params")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("arg:conv1a_weight", "conv1a.weight"),
        ("arg:res2a_branch1_weight", "b2.conv_branch1.weight"),
        ("res4b5_branch2b1_weight", "b4_5.conv_branch2b1.weight"),
        ("arg:bn5b2_branch2a_beta", "b5_2.bn_branch2a.bias"),
        ("arg:bn6a_branch2b2_gamma", "b6.bn_branch2b2.weight"),
        ("aux:bn3b1_branch2b1_moving_mean", "b3_1.bn_branch2b1.running_mean"),
        ("aux:bn7_moving_var", "bn7.running_var"),
        ("arg:linear1000_bias", None),
    ],
)
def test_published_names_become_the_released_ones(name, expected):
    assert mxnet_params.released_name(name) == expected


def test_the_published_file_is_converted_and_loaded_with_what_was_left_out_by_name(tmp_path):
    source, target = tmp_path / "published.params", tmp_path / "resnet38.safetensors"
    teacher = thin()
    source.write_bytes(params_bytes(published(teacher)))
    expected = backbone(teacher)
    assert convert_params(source, target) == len(expected)
    state = read_state_dict(target)
    assert state.keys() == expected.keys()
    for path in (source, target):
        student = thin(seed=1)
        before = {key: value.clone() for key, value in student.state_dict().items()}
        loaded = load_classifier_weights(student, path)
        assert set(loaded.matched) == set(expected)
        assert loaded.unknown == loaded.reshaped == ()
        assert set(loaded.missing) == {"fc8.weight"} | {f"bn{i}.{n}" for i in (2, 3, 4) for n in ("weight", "bias")}
        for key, value in student.state_dict().items():
            assert torch.equal(value, expected.get(key, before[key])), key
        assert str(loaded).startswith(f"{len(expected)} tensors loaded; 7 not in the file")


def test_half_and_double_precision_arrive_as_float32(tmp_path):
    arrays = {name: values.astype(np.float64) for name, values in published(thin()).items()}
    (tmp_path / "a.params").write_bytes(params_bytes(arrays))
    state = mxnet_params.classifier_state(tmp_path / "a.params")
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_a_released_stage_1_is_loaded_whole_from_a_state_dict(tmp_path):
    teacher, student = thin(mode="off"), thin(seed=1, mode="off")
    torch.save(teacher.state_dict(), tmp_path / "stage1.pth")
    assert load_classifier_weights(student, tmp_path / "stage1.pth").complete
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in student.state_dict().items())


def test_another_width_loads_nothing_and_is_refused(tmp_path):
    torch.save(thin().state_dict(), tmp_path / "thin.pth")
    with pytest.raises(UserError, match=r"thin\.pth: nothing fits ResNet-38.*published width"):
        load_classifier_weights(ResNet38(2, width_divisor=16), tmp_path / "thin.pth")


def test_numbers_that_a_script_logged_beside_its_weights_do_no_harm(tmp_path):
    content = {"epoch": 46, "best_pred": np.float64(0.76), "state_dict": thin().state_dict()}
    torch.save(content, tmp_path / "deeplab-resnet.pth.tar")
    assert read_state_dict(tmp_path / "deeplab-resnet.pth.tar").keys() == thin().state_dict().keys()


@pytest.mark.parametrize("place", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numbers_of_numpy_1_and_of_numpy_2_are_read(tmp_path, place):
    plain, rewritten = tmp_path / "plain.pth", tmp_path / "rewritten.pth"
    torch.save({"best_pred": np.float64(0.76), "state_dict": thin().state_dict()}, plain)
    own = np.float64(0).__reduce__()[0].__module__.encode()
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(rewritten, "w") as new:
        assert sum(own in old.read(name) for name in old.namelist()) == 1
        for name in old.namelist():
            # protocol 2 writes a module's name between "c" and a line feed
            new.writestr(name, old.read(name).replace(b"c" + own + b"\n", b"c" + place + b"\n"))
    assert read_state_dict(rewritten).keys() == thin().state_dict().keys()


def test_files_that_cannot_be_read_safely_are_refused(tmp_path):
    torch.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "module.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    for name, words in (("module.pth", "refused"), ("broken.safetensors", "cannot be read as safetensors")):
        with pytest.raises(UserError, match=words):
            load_classifier_weights(thin(), tmp_path / name)
    for name in ("nowhere.params", "nowhere.safetensors", "nowhere.pth"):
        with pytest.raises(UserError, match="no such file"):
            load_classifier_weights(thin(), tmp_path / name)


def test_every_foreign_name_is_listed_and_nothing_is_written(tmp_path):
    arrays = {"arg:fc6_weight": np.ones((2, 2), np.float32), "arg:res2a_branch1_beta": np.ones(2, np.float32)}
    (tmp_path / "vgg.params").write_bytes(params_bytes(arrays))
    with pytest.raises(BadInput) as refused:
        convert_params(tmp_path / "vgg.params", tmp_path / "out.safetensors")
    named = [problem.where for problem in refused.value.problems]
    assert named == ["arg:fc6_weight", "arg:res2a_branch1_beta", "conv1a.weight", "bn7.running_var"]
    assert [path.name for path in tmp_path.iterdir()] == ["vgg.params"]


def test_a_tensor_that_comes_twice_under_two_names_is_refused(tmp_path):
    arrays = published(thin())
    arrays["aux:bn_moving_var"] = arrays["aux:bn7_moving_var"]
    (tmp_path / "a.params").write_bytes(params_bytes(arrays))
    with pytest.raises(BadInput, match=r"aux:bn_moving_var: is bn7\.running_var a second time"):
        mxnet_params.classifier_state(tmp_path / "a.params")


def changed(content: bytes, position: int, kind: str, value: int) -> bytes:
    piece = struct.pack("<" + kind, value)
    return content[:position] + piece + content[position + len(piece) :]


WHOLE = params_bytes({"arg:x": np.arange(6, dtype=np.float32).reshape(2, 3)})
# header of 24 bytes; then magic, storage, dimensions, two sizes of 8 bytes, device, number, type code, 24 of values
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends within the header"),
    "another format": (b"PK\x03\x04" + bytes(60), "starts with 0x"),
    "reserved": (changed(WHOLE, 8, "Q", 1), "starts with 0x112, 0x1"),
    "sparse": (changed(WHOLE, 28, "i", 1), "storage type 1"),
    "dimensions": (changed(WHOLE, 32, "i", 33), "has 33 dimensions"),
    "negative dimensions": (changed(WHOLE, 32, "i", -1), "has -1 dimensions"),
    "a size of zero": (changed(WHOLE, 36, "q", 0), r"has shape \(0, 3\)"),
    "a huge size": (changed(WHOLE, 36, "q", 2**50), "ends within array 1 of 1"),
    "type": (changed(WHOLE, 60, "i", 7), "type code 7"),
    "cut in the values": (WHOLE[:70], "ends within array 1 of 1"),
    "cut in the names": (WHOLE[:-2], "ends within name 1 of 1"),
    "more names": (changed(WHOLE, 88, "Q", 2), "names 2 of 1 arrays"),
    "no text": (WHOLE[:-1] + b"\xff", "name 1 of 1 is no text"),
    "more bytes": (WHOLE + b"\0", "goes on for 1 bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_foreign_file_is_refused_with_what_is_wrong(tmp_path: Path, fault):
    content, words = FAULTS[fault]
    (tmp_path / "a.params").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        read_params(tmp_path / "a.params")


def test_the_unharmed_file_of_those_faults_is_read(tmp_path):
    (tmp_path / "a.params").write_bytes(WHOLE)
    np.testing.assert_array_equal(read_params(tmp_path / "a.params")["arg:x"], [[0, 1, 2], [3, 4, 5]])


def test_a_name_that_comes_twice_is_refused(tmp_path):
    content = params_bytes({"arg:x": np.ones(1, np.float32), "arg:y": np.ones(1, np.float32)})
    (tmp_path / "a.params").write_bytes(content.replace(b"arg:y", b"arg:x"))
    with pytest.raises(BadInput, match="names twice: arg:x"):
        read_params(tmp_path / "a.params")


def test_the_command_writes_the_same_file_and_asks_for_a_dataset_otherwise(tmp_path):
    source = tmp_path / "tower.params"
    source.write_bytes(params_bytes(published(thin())))
    convert_params(source, tmp_path / "expected.safetensors")
    done = CliRunner().invoke(cli, ["import-checkpoint", str(source), "-o", str(tmp_path / "found.safetensors")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "found.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert "--dataset" in CliRunner().invoke(cli, ["import-checkpoint", str(source)]).output
