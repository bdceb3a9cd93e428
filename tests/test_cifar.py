"""The paper's own data sets, through torchvision's own classes: a small stand-in for the archive, downloaded over HTTP."""
import hashlib
import io
import pickle
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

import train_teacher

torchvision = pytest.importorskip("torchvision")


def members(dataset, n=20):
    """Files of the archive: {name: (images (n, 3, 32, 32) uint8, labels)}, and the file of the class names."""
    rng = np.random.default_rng(0)
    if dataset == "cifar10":
        names, key, meta = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], "labels", {"label_names": list("abcdefghij")}
    else:
        names, key, meta = ["train", "test"], "fine_labels", {"fine_label_names": [f"{i:02d}" for i in range(100)]}
    classes = len(next(iter(meta.values())))
    batches = {name: {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), key: rng.integers(0, classes, n).tolist()} for name in names}
    return batches, {"batches.meta" if dataset == "cifar10" else "meta": meta}


@pytest.fixture(params=["cifar10", "cifar100"])
def stand_in(request, monkeypatch):
    """torchvision's class, pointed at a server of ours; yields (name, batches, how often the archive was asked for)."""
    batches, meta = members(request.param)
    source = getattr(torchvision.datasets, request.param.upper())
    files = {name: pickle.dumps(content) for name, content in (batches | meta).items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{source.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    archive, asked = buffer.getvalue(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(archive)))
            self.end_headers()
            self.wfile.write(archive)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(source, "url", f"http://127.0.0.1:{server.server_port}/{source.filename}")
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(source, "train_list", [[name, md5[name]] for name in batches if not name.startswith("test")])
    monkeypatch.setattr(source, "test_list", [[name, md5[name]] for name in batches if name.startswith("test")])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5[next(iter(meta))]})
    yield request.param, batches, asked
    server.shutdown()


def test_pixels_labels_and_names_are_the_archives(stand_in, tmp_path):
    name, batches, asked = stand_in
    data = train_teacher.load_data(name, str(tmp_path))
    before = len(asked)  # torchvision asks for redirections first
    assert train_teacher.load_data(name, str(tmp_path)).sha256 == data.sha256 and len(asked) == before > 0
    label = "labels" if name == "cifar10" else "fine_labels"
    for split, x, y in (("t", data.test_x, data.test_y), ("", data.train_x, data.train_y)):
        parts = [b for key, b in batches.items() if key.startswith("test") == bool(split)]
        pixels = np.concatenate([b["data"] for b in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        assert torch.equal(x, torch.from_numpy(pixels.copy())) and y.tolist() == sum((b[label] for b in parts), [])
    assert len(data.classes) == (10 if name == "cifar10" else 100) and data.shape == (3, 32, 32)


def test_the_papers_command_trains(stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_teacher.main(f"--dataset {stand_in[0]} --width 2 --depth 18 --epochs 1 --batch-size 10 --device cpu".split())
    assert train_teacher.load_checkpoint("r34.pt", "teacher")["data"]["name"] == stand_in[0]
