from pathlib import Path

import prune_cnn
import pytest
import torch
from PIL import Image


@pytest.mark.slow
def test_half_of_the_filters_go_and_an_epoch_brings_most_of_it_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "filters.png"
    found = prune_cnn.main(["--epochs", "4", "--runs", "3", "--output", str(picture)])
    printed = capsys.readouterr().out
    assert "108 of 216 filters put out anything" in printed and "rate that keeps 95 %" in printed
    assert found["dense"] > 0.8 and found["after one epoch"] > 0.8 * found["dense"]
    assert "72 of 144 neurons taken out; 31,434 -> 8,090 parameters" in " ".join(printed.split())
    assert found["shrunk"] == found["after one epoch"] and found["times faster"] > 1
    assert Image.open(picture).size == (1650, 660)


def test_folders_of_images_are_classes(tmp_path: Path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (20, 30), (120 * label, 10 * index, 5)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    data = prune_cnn.Folder(tmp_path, 16)
    assert data.classes == ["cat", "dog"] and data.labels == [0, 0, 0, 1, 1, 1]
    image, label = data[4]
    assert image.shape == (3, 16, 16) and label == 1
    red = (torch.tensor(120 / 255) - 0.485) / 0.229
    torch.testing.assert_close(image[0], red.expand(16, 16))
    training, reference, held_out = prune_cnn.loaders(data, data.labels, 0, batch=2)
    parts = [set(loader.dataset.indices) for loader in (training, reference, held_out)]
    assert not parts[0] & parts[2] and parts[1] <= parts[0] and len(parts[0] | parts[2]) == 6
    with pytest.raises(ValueError, match="two classes or more"):
        prune_cnn.Folder(tmp_path / "cat", 16)
