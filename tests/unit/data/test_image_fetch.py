"""Pictures of another node: their bytes enter this one once, whoever asks; what both engines see is compared by hash.

Not covered: the way between nodes (Ray, cluster.py); here a folder stands for the other node.
"""

import hashlib
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from other_node import Peer
from PIL import Image

from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.errors import DataError
from megatron_agent.types import ImageRef

ROOT = Path(__file__).parents[3]
LIMITS = PixelLimits(3136, 1 << 20)


def encoded(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def noise(seed, width=90, height=70):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def peer(tmp_path):
    return Peer(ImageStore(tmp_path / "there", LIMITS), tmp_path / "log")


@pytest.fixture
def refs(peer):
    return [peer.store.put(encoded(noise(seed))) for seed in range(5)]


def test_bytes_enter_once(peer, refs, tmp_path):
    here = ImageStore(tmp_path / "here", LIMITS, fetch=peer)
    assert refs[0].source not in here
    assert here.bytes_of(refs[0].source) == peer.store.bytes_of(refs[0].source) and refs[0].source in here
    crop = peer.store.crop(refs[0], (10, 10, 60, 60))
    assert here.pixel_hash(crop) == peer.store.pixel_hash(crop)
    assert here.region_px(refs[1]) == (0, 0, 90, 70)
    assert len(peer.log.read_text().splitlines()) == 2
    with pytest.raises(DataError, match="is not in the image store .*there"):
        here.bytes_of("ab" * 32)


def test_threads_of_a_process_fetch_once(peer, refs, tmp_path):
    here = ImageStore(tmp_path / "here", LIMITS, fetch=peer)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(here.bytes_of, [ref.source for ref in refs] * 8))
    assert found == [peer.store.bytes_of(ref.source) for ref in refs] * 8
    assert len(peer.log.read_text().splitlines()) == len(refs)


PROCESS = """
import pickle, sys
sys.path.insert(0, sys.argv[2])
store, sources = pickle.load(open(sys.argv[1], "rb"))
print("ready", flush=True)
sys.stdin.readline()
print(sum(len(store.bytes_of(source)) for source in sources))
"""


def test_eight_processes_of_a_node_fetch_once(peer, refs, tmp_path):
    sources = [ref.source for ref in refs]
    pickled = tmp_path / "store.pickle"
    pickled.write_bytes(pickle.dumps((ImageStore(tmp_path / "here", LIMITS, fetch=peer), sources)))
    command = [sys.executable, "-c", PROCESS, str(pickled), str(Path(__file__).parent)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) for _ in range(8)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    sizes = {int(process.communicate(timeout=60)[0]) for process in processes}
    assert sizes == {sum(len(peer.store.bytes_of(source)) for source in sources)}
    fetched = [line.split()[1] for line in peer.log.read_text().splitlines()]
    assert sorted(fetched) == sorted(sources)


def test_what_does_not_arrive_is_not_kept(peer, refs, tmp_path):
    wrong = ImageStore(tmp_path / "here", LIMITS, fetch=lambda source: b"something else")
    with pytest.raises(DataError, match="another hash"):
        wrong.bytes_of(refs[0].source)
    assert refs[0].source not in wrong
    wrong.fetch = peer  # the failed attempt does not stand in the way of the next one
    assert wrong.bytes_of(refs[0].source) == peer.store.bytes_of(refs[0].source)


# ---------------------------------------------------------------- pixels that both engines see
def test_trainer_and_vllm_see_the_same_pixels(tmp_path):
    """The trainer's patches and those of the processor that vLLM runs on the store's pictures, by the hash of their pixels.

    Patches differ by rounding of the normalisation; undone and rounded to bytes, they must be equal to the last bit.
    """
    from transformers import Qwen2VLImageProcessor

    from megatron_agent.models.qwen2_5_vl.vision import VisionConfig, patchify

    store = ImageStore(tmp_path / "store", LIMITS)
    whole = [store.put(encoded(noise(1, 400, 300), "JPEG")), store.put(encoded(noise(2, 3, 5))), store.put_picture(noise(3))]
    crop = store.crop(whole[0], (30, 40, 200, 180))
    refs = [*whole, crop, store.rotate(crop, 90), store.rotate(whole[0], 33), ImageRef(whole[1].source, 56, 84)]
    processor = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)  # as published: it may resize
    for ref in refs:
        theirs = processor(images=[store.picture(ref)], return_tensors="np")
        assert theirs["image_grid_thw"][0].tolist() == [1, ref.height_px // 14, ref.width_px // 14]
        ours = patchify(store.pixels(ref), VisionConfig(1, 8, 8, 2, 8))
        assert hash_of_patches(ours) == hash_of_patches(theirs["pixel_values"]), ref


def hash_of_patches(patches):
    """Of the bytes that normalised patches [N, 3 * 2 * 14 * 14] were made from."""
    from megatron_agent.models.qwen2_5_vl.vision import IMAGE_MEAN, IMAGE_STD

    pixels = np.asarray(patches, np.float64).reshape(len(patches), 3, -1) * IMAGE_STD[:, None] + IMAGE_MEAN[:, None]
    assert np.abs(pixels * 255 - (pixels * 255).round()).max() < 0.01
    return hashlib.sha256((pixels * 255).round().astype(np.uint8).tobytes()).hexdigest()
