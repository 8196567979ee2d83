from PIL import Image

from fedpriv.reporting.picture import write_picture


def test_the_picture_is_drawn_with_and_without_privacy(make_run) -> None:
    for folder, changes in {"private": {}, "open": {"privacy": None}}.items():
        path = write_picture(make_run(folder, **changes))
        with Image.open(path) as picture:
            width, height = picture.size
            colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
        assert width > height > 300
        assert (0, 114, 178) in colours
