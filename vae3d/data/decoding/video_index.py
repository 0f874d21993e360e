"""An index of a video file, so that reading frame i decodes only from the key frame before it; and its file.

Frame i is the i-th frame that the decoder returns. It is found like this:

1. index_cache.open_index returns the index of the file from the cache, or builds it: index_build.build reads all
   packets once, and decodes the beginning of the file to confirm the order of the frames, or the whole file if its
   timestamps cannot be trusted.
2. Row i of `VideoIndex.frames` has the number of the packet that frame i comes from, and the number of the packet at
   which decoding must start. Rows of `packets` have the position of each packet in the file.
3. FrameSource.decode (frame_source.py) decodes from that start on. Each packet carries its number instead of its
   timestamp, and the decoder passes the number on to the frame; the frame with the number of the packet is frame i.

readers.PyAVReader does the last two steps for the frames of a clip. kept_sources.py keeps the files and decoders that
were used last open.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import av
import numpy as np
from av.video.format import VideoFormat
from pydantic import TypeAdapter

from vae3d.data.media import MediaInfo, Size

VERSION = 5  # of the cache; start value of its CRC-32, so that files of other versions are rebuilt
CRC_BYTES = 4
DECODER_NUMBERS = (  # attributes of a codec context
    *("width", "height", "bits_per_coded_sample"),
    *("color_range", "color_primaries", "color_trc", "colorspace"),
)
MIN_ASPECT = 1 / 8  # width of a pixel by its height; a wider or higher one is an error of the file
MAX_DELAY = 64  # packets after its own until a frame comes out

PACKET = np.dtype([("offset", "<i8"), ("size", "<u4"), ("key", "u1")])
SEEK = np.dtype([("crc", "<u4"), ("dts", "<i8")])  # only of files that need the demuxer
FRAME = np.dtype([("packet", "<u4"), ("start", "<u4")])  # the packet it comes from, the packet to start decoding at
TIME = np.dtype("<f8")  # seconds since the first frame
ROW_TYPES = {"packets": PACKET, "frames": FRAME, "seek": SEEK, "times": TIME}  # arrays of VideoIndex


@dataclass(frozen=True)
class Decoder:
    """Parameters to open a decoder without the container. extradata: base64."""

    codec: str
    tag: str
    numbers: dict[str, int]
    extradata: str
    reorder: int

    @classmethod
    def like(cls, context: av.VideoCodecContext) -> Decoder | None:
        """None if the parameters cannot be passed on."""
        try:
            tag = context.codec_tag
        except UnicodeDecodeError:
            return None
        numbers = {name: int(getattr(context, name)) for name in DECODER_NUMBERS}
        extradata = base64.b64encode(context.extradata or b"").decode()
        return cls(context.name, tag, numbers, extradata, context.reorder_depth)

    def open(self, threads: int) -> av.VideoCodecContext:
        context = av.CodecContext.create(self.codec, "r")
        context.extradata = base64.b64decode(self.extradata) or None
        context.codec_tag = self.tag
        for name, number in self.numbers.items():
            setattr(context, name, number)
        context.thread_count = threads
        # Without the reorder depth, a decoder drops the first frames that come too late.
        context.options = {"has_b_frames": str(self.reorder)}
        return context


@dataclass(frozen=True)
class Header:
    """Metadata of an indexed file.

    orientation: (transpose, then flip rows, then flip columns) to make frames upright. stored: height and width before
    that. first: packet to start decoding at.
    ordered: how the order of frames is known: "times" from timestamps, "file" as the packets, "decoded" by decoding
    the whole file. "counted": by decoding, but frames cannot be matched to packets, so decoding starts at the first.
    """

    info: MediaInfo
    container: str
    stream: int
    decoder: Decoder | None
    orientation: tuple[bool, bool, bool]
    stored: Size
    first: int
    ordered: str

    @property
    def max_delay(self) -> float:
        """Packets after its own until a frame comes out, at most."""
        return math.inf if self.ordered == "counted" else MAX_DELAY


HEADER = TypeAdapter(Header)


@dataclass(frozen=True)
class VideoIndex:
    """The index of a video.

    packets: [N] PACKET. frames: [frames] FRAME. seek: [N] SEEK, of files that need the demuxer; None: packets can be
    read straight from the file. times: [frames] seconds since the first frame; None: the rate is constant.
    """

    header: Header
    packets: np.ndarray
    frames: np.ndarray
    seek: np.ndarray | None = None
    times: np.ndarray | None = None


# --- its file: a CRC-32, a line of JSON, and the rows


def pack(key: Sequence, index: VideoIndex) -> bytes:
    """The content of the file of an index. key: path, size and time of the video."""
    arrays = {name: array for name in ROW_TYPES if (array := getattr(index, name)) is not None}
    counts = {name: len(array) for name, array in arrays.items()}
    head = json.dumps({"key": list(key), "counts": counts, "header": asdict(index.header)}).encode()
    rows = b"".join(array.tobytes() for array in arrays.values())
    return _crc(head, rows) + head + b"\n" + rows


def parse(content: bytes, key: Sequence) -> VideoIndex | None:
    """The index in such a file; None if it is damaged, or of another size or time of the video. A stranger may
    have written it, beside a table."""
    head, _, rows = content[CRC_BYTES:].partition(b"\n")
    if content[:CRC_BYTES] != _crc(head, rows):
        return None
    try:
        value = json.loads(head)
        if value["key"][1:] != key[1:]:
            return None
        arrays, offset = {}, 0
        for name, count in value["counts"].items():
            arrays[name] = np.frombuffer(rows, ROW_TYPES[name], count, offset)
            offset += arrays[name].nbytes
        index = VideoIndex(HEADER.validate_python(value["header"]), **arrays)
        return index if _is_consistent(index) else None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


def _is_consistent(index: VideoIndex) -> bool:
    """Whether all numbers of an index are those of frames and packets that it has, and its decoder is one of videos.

    Raises what parse catches for an unknown codec or pixel format, and for a number that a decoder cannot have.
    """
    header, packets, frames = index.header, len(index.packets), len(index.frames)
    decoder, is_counted, info, times = header.decoder, header.ordered == "counted", header.info, index.times
    if decoder is not None and decoder.numbers.keys() <= set(DECODER_NUMBERS):
        decoder.open(1)  # an AttributeError for one of sound
    elif decoder is not None or index.seek is None:
        return False
    VideoFormat(info.pixels)
    return (
        frames == header.info.num_frames > 0
        and 0 <= header.first < packets
        and index.frames["start"].max() < packets
        and (is_counted or index.frames["packet"].max() < packets)
        and (index.seek is None or len(index.seek) == packets)
        and (times is None or (len(times) == frames and np.isfinite(times).all() and (np.diff(times) >= 0).all()))
        and min(header.stored) > 0
        and header.stored == ((info.width, info.height) if header.orientation[0] else (info.height, info.width))
        and 0 < info.fps < math.inf
        and MIN_ASPECT <= info.aspect <= 1 / MIN_ASPECT
    )


def _crc(head: bytes, rows: bytes) -> bytes:
    return zlib.crc32(rows, zlib.crc32(head, VERSION)).to_bytes(CRC_BYTES, "little")
