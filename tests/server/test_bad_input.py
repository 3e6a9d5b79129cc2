"""Whatever a client sends, it gets the right problem, and the next client its answer."""

from __future__ import annotations

import base64
import gzip
import io
import struct
import zlib
from collections.abc import Callable, Iterator

import pytest
from PIL import Image
from running import Running

Encode = Callable[..., bytes]


@pytest.fixture(autouse=True)
def still_serving(server: Running, encode: Encode) -> Iterator[None]:
    yield
    assert server.predict(encode(0)).status_code == 200


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def _problem(response, status: int, name: str) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == f"urn:trimrt:problem:{name}"
    assert problem["status"] == status
    assert problem["detail"]
    return problem


@pytest.mark.parametrize(
    ("body", "status", "name"),
    [
        pytest.param(b"", 400, "image-damaged", id="zero bytes"),
        pytest.param(b"hello, I am not an image", 400, "image-damaged", id="not an image"),
        pytest.param(b"\xff\xd8\xff" + b"\0" * 99, 400, "image-damaged", id="JPEG in name only"),
        pytest.param(_png_header(10_000, 10_000), 413, "image-too-large", id="100-megapixel header"),
        pytest.param(_png_header(2**31 - 1, 2**31 - 1), 413, "image-too-large", id="decompression bomb"),
        pytest.param(_png_header(64, 64), 400, "image-damaged", id="header without data"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "image-damaged", id="SVG"),
    ],
)
def test_bodies_that_are_no_usable_image(server: Running, body: bytes, status: int, name: str) -> None:
    problem = _problem(server.predict(body), status, name)
    assert problem["image"] == 0


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_truncated_files(server: Running, encode: Encode, form: str, share: float) -> None:
    image = encode(1, form, (300, 200))
    response = server.predict(image[: int(len(image) * share)])
    assert response.status_code in (200, 400), response.text  # a GIF or WebP may be whole enough
    if form in ("JPEG", "PNG"):
        _problem(response, 400, "image-damaged")


_GRADIENT = Image.linear_gradient("L").resize((64, 64))


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(_saved(_GRADIENT.convert("CMYK"), "JPEG"), id="CMYK"),
        pytest.param(_saved(_GRADIENT.convert("I;16"), "PNG"), id="16-bit"),
        pytest.param(_saved(_GRADIENT.convert("RGB").convert("P"), "PNG"), id="palette"),
        pytest.param(_saved(_GRADIENT.convert("LA"), "PNG"), id="grey with alpha"),
        pytest.param(_saved(_GRADIENT.convert("RGBA"), "WEBP"), id="alpha"),
        pytest.param(_saved(_GRADIENT, "JPEG"), id="greyscale"),
        pytest.param(_saved(_GRADIENT.convert("1"), "TIFF"), id="bilevel"),
        pytest.param(
            _saved(_GRADIENT, "GIF", save_all=True, append_images=[_GRADIENT.rotate(90)]), id="animated"
        ),
    ],
)
def test_unusual_images_are_answered(server: Running, image: bytes) -> None:
    assert server.predict(image).status_code == 200


def test_exif_orientation_is_applied(server: Running) -> None:
    upright = Image.merge("RGB", [_GRADIENT, _GRADIENT.rotate(90), _GRADIENT.rotate(180)])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned = _saved(upright.rotate(90), "PNG", exif=exif)
    answers = [server.predict(image).json()["results"][0] for image in (_saved(upright, "PNG"), turned)]
    assert answers[0]["predictions"] == answers[1]["predictions"]


def test_floating_point_pixels_are_unsupported(server: Running) -> None:
    _problem(server.predict(_saved(_GRADIENT.convert("F"), "TIFF")), 415, "unsupported-media-type")


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "video/mp4"])
def test_content_types_that_are_not_accepted(server: Running, encode: Encode, content_type: str) -> None:
    problem = _problem(server.predict(encode(0), content_type), 415, "unsupported-media-type")
    assert "image/*" in problem["detail"]


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    "content_type",
    [
        "image/jpg",
        "image/pjpeg",
        "image/x-png",
        "image/*",
        "application/octet-stream",
        "application/x-www-form-urlencoded",
        "",
    ],
)
def test_the_bytes_decide_of_which_format_an_image_is(
    server: Running, encode: Encode, form: str, content_type: str
) -> None:
    assert server.predict(encode(0, form), content_type).status_code == 200


def test_a_body_over_the_limit_by_its_header(server: Running) -> None:
    _problem(server.predict(b"\0" * (1 << 20) + b"\0"), 413, "body-too-large")


def test_a_body_over_the_limit_without_a_header(server: Running) -> None:
    chunks = (b"\0" * 65536 for _ in range(17))
    response = server.client.post("/predict", content=chunks, headers={"Content-Type": "image/png"})
    _problem(response, 413, "body-too-large")


@pytest.mark.parametrize("path", ["predict", "%70redict", "v2/models/tiny/infer"])
def test_a_compressed_body_is_refused_in_words(server: Running, encode: Encode, path: str) -> None:
    headers = {"Content-Type": "image/png", "Content-Encoding": "gzip"}
    response = server.client.post(f"/{path}", content=gzip.compress(encode(0)), headers=headers)
    assert "Content-Encoding" in _problem(response, 415, "unsupported-media-type")["detail"]
    assert response.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("encoding", ["", "identity", "Identity"])
def test_an_encoding_that_changes_nothing_is_none(server: Running, encode: Encode, encoding: str) -> None:
    headers = {"Content-Type": "image/png", "Content-Encoding": encoding}
    assert server.client.post("/predict", content=encode(0), headers=headers).status_code == 200


@pytest.mark.parametrize("query", ["a" * 5000, "&".join(f"a{n}=1" for n in range(100))], ids=["long", "many"])
def test_a_query_beyond_its_limits_is_refused(server: Running, encode: Encode, query: str) -> None:
    _problem(server.predict(encode(0), params=query), 422, "invalid-parameter")


@pytest.mark.parametrize("host", ["[", "[::1", "x y", "\xff", "127.0.0.1:99999999"])
@pytest.mark.parametrize("path", ["/nowhere", "/v2/nowhere", "/engines/none/unload", "/predict?top_k=0"])
def test_a_host_that_is_none_harms_nothing(server: Running, encode: Encode, host: str, path: str) -> None:
    headers = {"Host": host.encode("latin-1"), "Content-Type": "image/png"}
    assert server.client.post(path, content=encode(0), headers=headers).status_code in (403, 404, 422)


@pytest.mark.parametrize(
    "top_k",
    ["0", "-1", "11", "1e3", "many", "", "000000001999999", "000000001" + "9" * 3000, "1" * 3000, "²"],
)
def test_top_k_out_of_range(server: Running, encode: Encode, top_k: str) -> None:
    _problem(server.predict(encode(0), params={"top_k": top_k}), 422, "invalid-parameter")


def test_an_unknown_engine(server: Running, encode: Encode) -> None:
    problem = _problem(server.predict(encode(0), params={"engine": "../tiny"}), 404, "engine-not-found")
    assert "other, tiny" in problem["detail"]


def _form(server: Running, body: bytes, content_type: str = "multipart/form-data; boundary=b"):
    return server.client.post("/predict", content=body, headers={"Content-Type": content_type})


_PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'


@pytest.mark.parametrize(
    ("body", "parameters", "told"),
    [
        pytest.param(_PART + b"abc", "; boundary=b", "ends before its last boundary", id="truncated"),
        pytest.param(b"", "; boundary=b", "no line '--b'", id="empty"),
        pytest.param(_PART + b"abc\r\n--b--\r\n", "", "let your HTTP client write", id="no boundary"),
        pytest.param(b"--c\r\n\r\n\r\n--c--", "; boundary=b", "no line '--b'", id="other boundary"),
        pytest.param(_PART + b"abc\r\n--b--\r\n", "; boundary=--b", "no line '----b'", id="too many dashes"),
        pytest.param(b"--b\r\nnot a header\r\n\r\n--b--", "; boundary=b", "not a header", id="broken header"),
    ],
)
def test_forms_that_cannot_be_parsed(server: Running, body: bytes, parameters: str, told: str) -> None:
    response = _form(server, body, "multipart/form-data" + parameters)
    assert told in _problem(response, 400, "malformed-request")["detail"]


@pytest.mark.parametrize(
    ("names", "came"),
    [
        ([], "no fields"),
        (["image"], "`image`"),
        (["image", "top_k", "image"], "`image`, `top_k`"),
        ([f"f{n}" for n in range(12)], ", ".join(f"`f{n}`" for n in range(10)) + ", others"),
        (["x" * 300], "`" + "x" * 50 + "`"),
    ],
)
def test_a_form_without_the_field_is_told_which_fields_came(
    server: Running, names: list[str], came: str
) -> None:
    part = '--b\r\nContent-Disposition: form-data; name="{}"\r\n\r\nx\r\n'
    body = "".join([part.format(name) for name in names]) + "--b--\r\n"
    problem = _problem(_form(server, body.encode()), 422, "invalid-parameter")
    assert problem["detail"] == f"the form has no field `file`; it has {came}"


@pytest.mark.parametrize("path", ["predict", "%70redict"])
def test_empty_files_and_data_urls_are_named(server: Running, encode: Encode, path: str) -> None:
    good = ("file", ("a.png", encode(1)))
    url = b"data:image/png;base64," + base64.b64encode(encode(1))
    for content, said in [(b"", "is empty"), (url, "is a data: URL")]:
        form = [good, ("file", ("b.png", content))]
        problem = _problem(server.client.post(f"/{path}", files=form), 400, "image-damaged")
        assert problem["image"] == 1
        assert problem["detail"].startswith(f"image 1 (b.png) {said}")
        problem = _problem(server.predict(content), 400, "image-damaged")
        assert problem["detail"].startswith(f"image 0 {said}")


def test_one_bad_file_among_good_ones_is_named(server: Running, encode: Encode) -> None:
    files = [("file", ("a.png", encode(1))), ("file", ("b.png", b"broken")), ("file", ("c.png", encode(2)))]
    problem = _problem(server.client.post("/predict", files=files), 400, "image-damaged")
    assert problem["image"] == 1


def test_too_many_files(server: Running, encode: Encode) -> None:
    files = [("file", (f"{n}.png", encode(1))) for n in range(17)]
    _problem(server.client.post("/predict", files=files), 413, "too-many-images")


# The third might be redirected, to wherever the client's Host header says.
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/predict", 405), ("GET", "/nowhere", 404), ("POST", "/predict/", 404)],
)
def test_unknown_routes(server: Running, method: str, path: str, status: int) -> None:
    name = {404: "not-found", 405: "method-not-allowed"}[status]
    _problem(server.client.request(method, path), status, name)
