"""An index of a video file, so that reading frame i decodes only from the key frame before it.

Frame i is the i-th frame that the decoder returns. It is found like this:

1. open_index returns the index of the file from the cache, or builds it: `build` reads all packets once, and decodes
   the beginning of the file to confirm the order of the frames, or the whole file if its timestamps cannot be trusted.
2. Row i of `VideoIndex.frames` has the number of the packet that frame i comes from, and the number of the packet at
   which decoding must start. Rows of `packets` have the position of each packet in the file.
3. FrameSource.decode decodes from that start on. Each packet carries its number instead of its timestamp, and the
   decoder passes the number on to the frame; the frame with the number of the packet is frame i.

readers.PyAVReader does the last two steps for the frames of a clip. open_source and keep_source keep the files and
decoders that were used last open.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import itertools
import json
import math
import os
import struct
import threading
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from pydantic import TypeAdapter

from vae3d.data.media import MediaError, MediaInfo, Size, one_line
from vae3d.data.paths import cache_folder
from vae3d.data.storage import FileRange, RangeFile, local_range
from vae3d.errors import UserError
from vae3d.io import atomic_write

VERSION = 4  # of the cache; start value of its CRC-32, so that files of other versions are rebuilt
CRC_BYTES = 4
# What libav and PyAV raise for a damaged file. Other exceptions are bugs of ours.
DECODER_ERRORS = (av.error.FFmpegError, OSError, ValueError, MemoryError, RuntimeError, LookupError, ArithmeticError)

# Demuxers that read only the file they are given; not those of playlists and scripts, which open other files.
FORMATS = (
    "mov,matroska,avi,mpeg,mpegts,mpegtsraw,mpegvideo,m4v,h264,hevc,vvc,obu,ivf,flv,asf,ogg,gif,rm,dv,mxf,nut,wtv,mjpeg,"
    "yuv4mpegpipe,vc1,h263,swf,4xm,nsv,roq,bink,smk,fli,apng,aac,mp3,wav,flac,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,gif_pipe,ppm_pipe,pgm_pipe,j2k_pipe,jpegxl_pipe,image2"
)
OPEN_OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
RANGE_OPTIONS = {
    "format_whitelist": FORMATS.removesuffix(",image2"),
    "protocol_whitelist": "none",
}  # image2 opens files

# Accept metadata of any encoding, as PyAV 19 does by default.
METADATA = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
DISCARD_ALL = 48  # AVDiscard

# Containers that store presentation times, and codecs with one frame per packet. Not VP8, which has packets without a
# frame, and not MPEG-1, -2 and -4, with open groups at the start and uncoded frames.
TIMED = {"mov", "matroska", "mpegts", "flv"}
ONE_FRAME = {"h264", "hevc", "av1", "vp9", "ffv1"}
BYTE_SEEK = {"mpegts", "mpeg"}  # seek these by byte: positions are exact, timestamps may not be
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic
DECODER_NUMBERS = (  # attributes of a codec context
    *("width", "height", "bits_per_coded_sample"),
    *("color_range", "color_primaries", "color_trc", "colorspace"),
)
RATES = [Fraction(n) for n in (8, 10, 12, 15, 16, 20, 24, 25, 30, 48, 50, 60, 90, 100, 120)]
RATES += [Fraction(n * 1000, 1001) for n in (12, 15, 24, 30, 48, 60, 120)]
SEEK_WITHIN = 64  # packets after a seek among which the wanted one must be
CHECKED = 8  # frames at the beginning whose order is compared with the timestamps
# Codecs that mark each frame that no other needs (nal_ref_idc of H.264), so that the decoder can leave it out. In HEVC
# the mark holds only within a temporal layer.
SKIPPING = {"h264"}
KEYS_BACK = 4  # earlier key frames to retry from if a frame does not decode completely
TRANSPARENT = "has transparent pixels; flatten it onto a background of your choice"
MAX_REORDER = 16  # frames that are shown later and decoded earlier than a frame, of any codec
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


look_in: dict[Path, Callable[[Sequence], bytes | None]] = {}  # beside tables: key of a video -> a file of the cache


def open_index(path: str | Path | FileRange) -> VideoIndex:
    """The index of a video: from the cache, from beside a table of this process, or built if the size or time of the
    file, tar or object changed. Raises MediaError.
    """
    video = as_range(path)
    key = _key(video)
    file = _cache_file(key)
    index = _load(file, key)
    if index is None:
        found = (content for find in look_in.values() if (content := find(key)) is not None)
        index = next((index for content in found if (index := _parse(content, key))), None)
    if index is None:
        index = build(video)
        _store(file, key, index)
    return index


def cached(path: str) -> tuple[list, bytes] | None:
    """Key and content of the cache's file of a video; None: there is none, or it is outdated."""
    try:
        key = _key(as_range(path))
        content = _cache_file(key).read_bytes()
    except (OSError, MediaError):
        return None
    return (key, content) if _parse(content, key) is not None else None


def _key(video: FileRange) -> list:
    return [os.path.abspath(video.file) if video.is_plain else video.name, *video.version]


def _cache_file(key: list) -> Path:
    name = hashlib.blake2b(os.fsencode(key[0]), digest_size=12).hexdigest()
    return cache_folder() / "index" / name[:2] / name[2:]


def _load(file: Path, key: list) -> VideoIndex | None:
    """The cached index; None if there is none, or it is damaged or outdated."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    return _parse(content, key)


def _parse(content: bytes, key: list) -> VideoIndex | None:
    """The index in a file of the cache; None if it is damaged, or of another size or time of the video. A stranger may
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
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


def _is_consistent(index: VideoIndex) -> bool:
    """Whether all numbers of an index are those of frames and packets that it has."""
    header, packets, frames = index.header, len(index.packets), len(index.frames)
    decoder, is_counted = header.decoder, header.ordered == "counted"
    if decoder is not None:
        base64.b64decode(decoder.extradata)
    return (
        frames == header.info.num_frames > 0
        and 0 <= header.first < packets
        and index.frames["start"].max() < packets
        and (is_counted or index.frames["packet"].max() < packets)
        and (index.seek is None or len(index.seek) == packets)
        and (index.times is None or len(index.times) == frames)
        and (decoder is None or decoder.numbers.keys() <= set(DECODER_NUMBERS))
        and min(header.info.height, header.info.width, *header.stored) > 0
    )


def _store(cached: Path, key: list, index: VideoIndex) -> None:
    """Write a file of a CRC-32, a line of JSON, and the rows."""
    arrays = {name: array for name in ROW_TYPES if (array := getattr(index, name)) is not None}
    counts = {name: len(array) for name, array in arrays.items()}
    head = json.dumps({"key": key, "counts": counts, "header": asdict(index.header)}).encode()
    rows = b"".join(array.tobytes() for array in arrays.values())
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cached) as stream:
            stream.write(_crc(head, rows) + head + b"\n" + rows)
    except OSError as error:
        warn_cache_unwritable(error, "each time a video is opened, the whole file is read")


def _crc(head: bytes, rows: bytes) -> bytes:
    return zlib.crc32(rows, zlib.crc32(head, VERSION)).to_bytes(CRC_BYTES, "little")


def warn_cache_unwritable(error: OSError, consequence: str) -> None:
    warnings.warn(
        f"cannot write to the cache folder {cache_folder()} ({error.strerror}): {consequence}; set VAE3D_CACHE to a "
        "writable folder",
        stacklevel=3,
    )


# --- building an index


def build(path: str | Path | FileRange) -> VideoIndex:
    """The index of a file, or of a range of one.

    Reads all packets, and decodes as much as it takes to confirm the order of frames: the beginning; or the whole file,
    twice, if timestamps are missing, repeat, run backwards or are made up by the container.
    Raises MediaError if the file is damaged, or has content that cannot be read faithfully.
    """
    file = as_range(path)
    path = file.name
    with media_errors(path, "is not a readable video"), closing(open_container(file)) as container:
        names = set(container.format.name.split(","))
        stream = _video_stream(path, container)
        packets = _read_packets(file, container, stream, names)
        context = stream.codec_context
        first = int(np.argmax(packets.rows["key"]))  # 0 if there is no key frame
        expected = _order_by_packets(packets, first, names, context)
        decoder, codec, container_name = Decoder.like(context), context.name, container.format.name
        index = stream.index
        rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        aspect, unit = float(stream.sample_aspect_ratio or 1), stream.time_base

    # Frame order: as packets define it, if the first decoded frames confirm that, else by decoding them all.
    last = len(packets.rows) - 1
    cut = last if names & BYTE_SEEK else None  # such files can be cut within a packet
    if expected is not None:
        ordered, display_order = expected
        leading = set(display_order[: display_order.index(first)])  # of an open group whose beginning is missing
        regular = [number for number in display_order if number not in leading and not packets.discard[number]]

        def enough(shown: Sequence[int | None]) -> bool:
            return sum(number not in leading for number in shown) >= CHECKED

        first_frame, shown, hashes = _decode_in_order(file, index, first, cut, enough)
        shown_leading = [number for number in shown if number in leading]  # the decoder drops some of them
        order = shown_leading + regular
        if shown != order[: len(shown)] or not (enough(shown) or len(shown) == len(order)):
            expected = None
        elif cut is not None and not _decodes_completely(file, index, packets, last):
            order = order[: order.index(last)]
    if expected is None:
        first_frame, shown, hashes = _decode_in_order(file, index, first, cut)
        distinct = len({number for number in shown if number is not None}) == len(shown)
        ordered, display_order = ("decoded", shown) if distinct else ("counted", [])
        order = shown if distinct else list(range(len(shown)))

    # Where decoding starts. After a seek, the demuxer does not repeat settings of earlier packets: start at the first.
    starts = {} if packets.stateful else _starts(display_order, packets.rows["key"], first, intra=ordered == "file")
    frames = np.array([(number, starts.get(number, first)) for number in order], FRAME)

    times, rate = _times(packets, shown if ordered == "counted" else order, names, unit, rates)
    orientation, stored = _orientation(path, first_frame), (first_frame.height, first_frame.width)
    if not 1 / 8 <= aspect <= 8:
        raise MediaError(path, f"has pixels {aspect:g} times as wide as high; correct its aspect ratio")
    header = Header(
        info=MediaInfo(
            len(order),
            *(stored[::-1] if orientation[0] else stored),
            float(rate),
            codec,
            first_frame.format.name,
            max(component.bits for component in first_frame.format.components),
            1 / aspect if orientation[0] else aspect,
        ),
        container=container_name,
        stream=index,
        decoder=decoder,
        orientation=orientation,
        stored=stored,
        first=first,
        ordered=ordered,
    )
    seek = None if packets.contiguous and decoder is not None else packets.seek
    return _verified(file, VideoIndex(header, packets.rows, frames, seek, times), packets.seek, hashes)


def _video_stream(path: str, container: InputContainer) -> VideoStream:
    name = container.format.name
    if name.endswith("_pipe") or name == "image2":
        raise MediaError(path, f"is an image ({name}), not a video, whatever its extension says")
    stream = container.streams.best("video")
    videos = [stream] if stream else container.streams.video
    if not videos or all(stream.disposition & Disposition.attached_pic for stream in videos):  # such as cover art
        kinds = sorted({"a still picture" if stream in videos else stream.type for stream in container.streams})
        raise MediaError(path, f"has no video stream, only {', '.join(kinds) or 'nothing'}")
    if videos[0].codec_context is None:
        raise MediaError(path, "has a codec for which there is no decoder here")
    if videos[0].metadata.get("alpha_mode") == "1":
        raise MediaError(
            path,
            "has transparent pixels beside its frames, which the decoder does not return; flatten it, or for a model "
            "of 4 channels convert it: ffmpeg -c:v libvpx-vp9 -i IN -pix_fmt yuva420p -c:v ffv1 OUT.mkv",
        )
    return videos[0]


@dataclass
class _Packets:
    """All non-empty packets of the stream, in file order.

    pts, dts: None where missing. discard: decoded, but not shown. contiguous: packets can be read straight from the
    file. stateful: some carry a palette or other settings that apply to later packets.
    """

    rows: np.ndarray
    seek: np.ndarray
    pts: list[int | None]
    dts: list[int | None]
    discard: list[bool]
    contiguous: bool
    stateful: bool


def _read_packets(file: FileRange, container: InputContainer, stream: VideoStream, names: set[str]) -> _Packets:
    path = file.name
    rows, seek, pts, dts, discard = [], [], [], [], []
    lead: int | None = 0
    settings, stateful = {"new_extradata": stream.codec_context.extradata}, False
    with file.open() as opened, media_errors(path, "is damaged or cut short"):
        for packet in _demux(container, stream):
            if packet.is_corrupt and not names & BYTE_SEEK:
                _check_whole(path, opened, len(rows), stream, names)
                raise MediaError(path, f"is damaged or cut short: packet {len(rows)} is incomplete")
            for kind in ("new_extradata", "param_change", "palette"):
                if packet.has_sidedata(kind):
                    stateful |= settings.get(kind) != (content := bytes(packet.get_sidedata(kind)))
                    settings[kind] = content
            if lead is not None:
                lead = None if stateful else _lead(opened, packet, lead)
            offset = -1 if packet.pos is None else packet.pos
            rows.append((offset + (lead or 0), packet.size, packet.is_keyframe))
            seek.append((zlib.crc32(packet), packet.dts or 0))
            pts.append(packet.pts)
            dts.append(packet.dts)
            discard.append(packet.is_discard)
        _check_whole(path, opened, len(rows), stream, names)
    if not rows:
        raise MediaError(path, "holds no frames")
    return _Packets(np.array(rows, PACKET), np.array(seek, SEEK), pts, dts, discard, lead is not None, stateful)


def _lead(file: RangeFile, packet: av.Packet, lead: int) -> int | None:
    """Bytes between a packet's position and its content, preferably `lead`; None if the content is not there."""
    if packet.pos is None:
        return None
    content = bytes(packet)
    if file.pread(len(content), packet.pos + lead) == content:
        return lead
    found = file.pread(len(content) + 64, packet.pos).find(content)
    return None if found < 0 else found


def _check_whole(path: str, file: RangeFile, packets: int, stream: VideoStream, names: set[str]) -> None:
    """Raise MediaError if the container's header says that the file should be longer."""
    if "mov" in names and packets < len(stream.index_entries):  # an edit list may exclude some
        promised = sum(entry.size > 0 for entry in stream.index_entries)
        if packets < promised:
            raise MediaError(path, f"is cut short: its header promises {promised} frames, {packets} are there")
    end, size = _promised_end(file, names), file.size
    if end is not None and end > size:
        raise MediaError(path, f"is cut short: its header promises {end} bytes, {size} are there")


def _promised_end(file: RangeFile, names: set[str]) -> int | None:
    """End of the file in bytes, by the sizes in the container's outermost headers; None if unknown."""
    size, offset = file.size, 0
    if "matroska" in names:  # EBML header, then one segment; both have an identifier of 4 bytes
        for _ in range(2):
            head = file.pread(8, offset + 4)
            width = 9 - head[0].bit_length()
            unknown = (1 << 7 * width) - 1  # as in a live stream
            length = int.from_bytes(head[:width], "big") & unknown
            if length == unknown:
                return None
            offset += 4 + width + length
        return offset
    if "avi" in names:  # RIFF chunks; their size counts from behind itself
        while offset + 12 <= size:
            kind, length = struct.unpack("<4sI", file.pread(8, offset))
            if kind != b"RIFF" or not length:
                break
            offset += 8 + length
        return offset or None
    if "gif" in names:
        return _gif_end(file.pread(size, 0))
    if "mov" in names:  # boxes; size 1: a longer size follows, 0: up to the end
        while offset + 8 <= size:
            length, kind = struct.unpack(">I4s", file.pread(8, offset))
            if length == 1:
                length = int.from_bytes(file.pread(8, offset + 8), "big")
            if length < 8 or not kind.isalnum():
                return None
            offset += length
        return offset
    return None


def _gif_end(content: bytes) -> int | None:
    """End of a GIF in bytes, by the lengths of its blocks; None if it has non-standard blocks."""
    table = lambda offset: 6 << (content[offset] & 7) if content[offset] & 128 else 0  # noqa: E731  bytes of colours
    offset = 13 + table(10)
    while offset < len(content) and content[offset] != 0x3B:
        if content[offset] == 0x2C and offset + 9 < len(content):  # a picture
            offset += 11 + table(offset + 9)
        elif content[offset] == 0x21:  # an extension
            offset += 2
        else:
            return None
        while offset < len(content) and content[offset]:
            offset += 1 + content[offset]
        offset += 1
    return offset


def _order_by_packets(
    packets: _Packets, first: int, names: set[str], context: av.VideoCodecContext
) -> tuple[str, list[int]] | None:
    """("file" or "times", packet numbers in the order of their frames); None if packets do not define the order."""
    numbers = list(range(first, len(packets.pts)))
    if context.codec.intra_only:
        return "file", numbers
    if not names & TIMED or context.codec.canonical_name not in ONE_FRAME:
        return None
    pts, dts = ([values[number] for number in numbers] for values in (packets.pts, packets.dts))
    known = [time for time in dts if time is not None]
    if None in pts or len(set(pts)) < len(pts) or any(a >= b for a, b in itertools.pairwise(known)):
        return None
    order = sorted(numbers, key=packets.pts.__getitem__)
    if context.reorder_depth and order == numbers:
        return None  # as in a remuxed AVI, whose decoding times were stored as presentation times
    return "times", order


def _decoded(file: FileRange, index: int, start: int, cut: int | None = None) -> Iterator[VideoFrame]:
    """Frames from packet `start` on, by the container's decoder; pts is the number of the packet of each.

    cut: a packet that may be incomplete, whose errors are ignored. Raises MediaError.
    """
    path = file.name
    with media_errors(path, "cannot be decoded"), closing(open_container(file)) as container:
        stream = container.streams[index]
        stream.codec_context.thread_count = 1
        packets = itertools.islice(_demux(container, stream), start, None)
        for number, packet in enumerate(itertools.chain(packets, [None]), start):  # None gives the last frames
            try:
                with media_errors(path, f"is damaged: packet {number} cannot be decoded"):
                    frames = stream.codec_context.decode(packet and _numbered(packet, number))
            except MediaError:
                if number != cut:
                    raise
            else:
                yield from frames


def _decode_in_order(
    file: FileRange, index: int, first: int, cut: int | None, enough: Callable[[Sequence], bool] = lambda shown: False
) -> tuple[VideoFrame, list[int | None], list[int]]:
    """(first frame, packet number of each frame, CRC-32 of its pixels), in the order of the decoder, until `enough`.

    Starts at packet `first`. cut: a packet that may be incomplete; if it is, its frame and the frames after it are
    dropped. Raises MediaError.
    """
    path = file.name
    first_frame, shown, hashes = None, [], []
    convert = VideoReformatter()
    with closing(_decoded(file, index, first, cut)) as frames:
        for frame in frames:
            if shown and frame.is_corrupt and frame.pts == cut:
                break
            if first_frame is None:
                first_frame = frame
                if transfer := HDR_TRANSFERS.get(int(frame.color_trc)):
                    reason = "tone-map it to SDR first, 8-bit RGB would look washed out"
                    raise MediaError(path, f"is HDR ({transfer}); {reason}")
            check_frame(path, frame, len(shown), (first_frame.height, first_frame.width))
            shown.append(frame.pts)
            hashes.append(zlib.crc32(np.ascontiguousarray(to_rgb(path, frame, convert, has_alpha(frame.format)))))
            if enough(shown):
                break
    if first_frame is None:
        raise MediaError(path, "holds no frame that can be decoded")
    return first_frame, shown, hashes


def _decodes_completely(file: FileRange, index: int, packets: _Packets, number: int) -> bool:
    """Whether the frame of a packet decodes completely, starting a few key frames before it."""
    keys = np.flatnonzero(packets.rows["key"][: number + 1])
    start = int(keys[-KEYS_BACK:][0]) if len(keys) else 0
    try:
        with closing(_decoded(file, index, start)) as frames:
            frame = next((frame for frame in frames if frame.pts == number), None)
    except MediaError:
        return False
    return frame is not None and not frame.is_corrupt


def _starts(display_order: Sequence[int], key: np.ndarray, first: int, intra: bool) -> dict[int, int]:
    """Packet -> packet to start decoding at: the last key packet whose frame is not shown after its own.

    That is also right for an open group, whose first frames are shown before the key frame that precedes them.
    """
    starts, current = {}, first
    for number in display_order:
        if (intra or key[number]) and number > current:
            current = number
        starts[number] = current
    return starts


def _times(
    packets: _Packets, order: Sequence[int | None], names: set[str], unit: Fraction, rates: Sequence[Fraction | None]
) -> tuple[np.ndarray | None, Fraction]:
    """(seconds of each frame since the first, None if the rate is constant; frames per second, the mean if it varies).

    Times are those of the frames' packets. Decoding times, as in AVI, are sorted. A step back, as in joined recordings,
    is replaced by the median step.
    """
    stored = packets.dts if "avi" in names or None in packets.pts else packets.pts
    stamps = [None if number is None else stored[number] for number in order]
    if None not in stamps and all(a <= b for a, b in itertools.pairwise(stored[number] for number in sorted(order))):
        stamps = sorted(stamps)
    known = [Fraction(rate) for rate in rates if rate]
    if None in stamps or stamps[0] == stamps[-1]:
        return None, known[0] if known else Fraction(25)  # the default of the ffmpeg program
    ticks = np.diff(np.array(stamps, dtype=np.int64))
    if (ticks < 0).any():
        forward = ticks[ticks > 0]
        ticks[ticks < 0] = int(np.median(forward)) if len(forward) else 0
    ticks = np.concatenate([[0], np.cumsum(ticks)])
    if not ticks[-1]:
        return None, known[0] if known else Fraction(25)
    mean = Fraction(len(ticks) - 1) / (int(ticks[-1]) * Fraction(unit))
    for rate in [*known, *sorted(RATES, key=lambda rate: abs(rate - mean))]:
        # Times are rounded to the unit of the container, a millisecond in Matroska.
        if np.abs(ticks * float(unit * rate) - np.arange(len(ticks))).max() <= 1.001 * float(unit * rate):
            return None, rate
    return ticks * float(unit), mean


def _verified(file: FileRange, index: VideoIndex, seek: np.ndarray, hashes: Sequence[int]) -> VideoIndex:
    """The index, after a check that decoding from the indexed starts gives the frames with the known hashes.

    If a start does not, the start before it is used, then the demuxer, with `seek`. Raises MediaError if nothing works.
    """
    first, frames = index.header.first, index.frames
    with closing(FrameSource(file, index)) as source:
        good = first
        for start in np.unique(frames["start"][: len(hashes)]).tolist():
            indices = np.flatnonzero(frames["start"][: len(hashes)] == start)
            expected = {int(frames["packet"][i]): hashes[i] for i in indices}
            if _decodes_to(source, start, expected):
                good = start
            elif start != first:
                frames["start"][frames["start"] == start] = good
            elif index.seek is None:
                return _verified(file, replace(index, seek=seek), seek, hashes)
            else:
                raise MediaError(file.name, "is damaged: it decodes to other frames each time")
    return index


def _decodes_to(source: FrameSource, start: int, expected: dict[int, int]) -> bool:
    """Whether decoding from packet `start` gives frames of these hashes. expected: packet -> hash."""
    left, convert = dict(expected), VideoReformatter()
    try:
        for fed, frames in source.decode(start):
            for number, frame in frames:
                if number in left:
                    pixels = to_rgb(source.path, frame, convert, has_alpha(frame.format))
                    if frame.is_corrupt or zlib.crc32(np.ascontiguousarray(pixels)) != left.pop(number):
                        return False
            if not left or fed > max(left) + source.index.header.max_delay:
                break
    except MediaError:
        return False
    return not left


# --- decoding from any packet on


class Wanted:
    """The packets whose frames a read needs. The reader sets them; FrameSource.decode asks for each packet.

    packets: their numbers; None: all. skipped: packets whose frames were not decoded, because nothing needs them.
    """

    def __init__(self) -> None:
        self.skipped: set[int] = set()
        self.set(None)

    def set(self, packets: Iterable[int] | None) -> None:
        self.packets = None if packets is None else frozenset(packets)
        self.last = max(self.packets or (), default=-1)

    def can_skip(self, packet: int) -> bool:
        """Whether the read needs no frame of this packet. Later packets are not skipped: the next read may go on."""
        return self.packets is not None and packet < self.last and packet not in self.packets


class FrameSource:
    """Decodes a file from a given packet on. Its file and decoder stay open, so that the next start costs less."""

    def __init__(self, path: str | Path | FileRange, index: VideoIndex, threads: int = 1) -> None:
        self.range = as_range(path)
        self.path, self.index, self.threads = self.range.name, index, threads
        self.file: RangeFile | None = None
        self.container: InputContainer | None = None
        self.decoder: av.VideoCodecContext | None = None
        self.reused = False  # whether the decoder was flushed, and not a new one, at the last start
        self.version: tuple | None = None  # of the file, if it may be kept open
        header = index.header
        # A flushed decoder and one that skips frames must number frames by their packets.
        self._reuses = header.ordered != "counted" and index.seek is None
        self._skips = header.ordered != "counted" and header.info.codec in SKIPPING

    def decode(
        self, start: int, wanted: Wanted | None = None, fresh: bool = True
    ) -> Iterator[tuple[int, list[tuple[int, VideoFrame]]]]:
        """Decode from packet `start` on. Yields for each packet its number and the frames that come out after it, each
        with the number of its packet (or its own number, if the order is "counted").

        wanted: frames that no other frame and no read needs are not decoded. fresh: with a new decoder, not a flushed
        one. Raises MediaError.
        """
        count = 0
        with media_errors(self.path, "cannot be decoded"):
            if self.index.seek is None:
                packets, context = self._stored(start), self._ready_decoder(fresh)
            else:
                packets, context = self._demuxed(start)
            for number, packet in packets:
                skipped = wanted is not None and self._skips and wanted.can_skip(number)
                if self._skips:
                    context.skip_frame = "NONREF" if skipped else "DEFAULT"
                try:
                    frames = context.decode(_numbered(packet, number))
                except DECODER_ERRORS as error:
                    raise _media_error(self.path, f"cannot be decoded at packet {number}", error) from error
                if skipped:
                    wanted.skipped.add(number)
                yield number, self._with_numbers(frames, count)
                count += len(frames)
            yield len(self.index.packets), self._with_numbers(context.decode(None), count)

    def _ready_decoder(self, fresh: bool) -> av.VideoCodecContext:
        self.reused = self._reuses and not fresh and self.decoder is not None
        if self.reused:
            self.decoder.flush_buffers()
        else:
            self.decoder = self.index.header.decoder.open(self.threads)
        return self.decoder

    def _with_numbers(self, frames: list[VideoFrame], count: int) -> list[tuple[int, VideoFrame]]:
        if self.index.header.ordered == "counted":
            return list(enumerate(frames, count))
        return [(frame.pts, frame) for frame in frames]

    def _stored(self, start: int) -> Iterator[tuple[int, av.Packet]]:
        """Packets read straight from the file."""
        if self.file is None:
            self.file = self.range.open()
        total = len(self.index.packets)
        for number in range(start, total):
            offset, size, key = self.index.packets[number].tolist()
            content = self.file.pread(size, offset)
            if len(content) < size:
                raise MediaError(self.path, f"ends within packet {number} of {total}")
            packet = av.Packet(size)  # with padding that the decoder may read; one made from `content` has none
            packet.update(content)
            packet.is_keyframe = bool(key)
            yield number, packet

    def _demuxed(self, start: int) -> tuple[Iterator[tuple[int, av.Packet]], av.VideoCodecContext]:
        """(packets read by the demuxer and compared with the index, its decoder)."""
        offset, size, _ = self.index.packets[start].tolist()
        crc, dts = self.index.seek[start].tolist()
        packets, context = self._open()
        if start:
            by_byte = self.container.format.name in BYTE_SEEK
            position = offset if by_byte else dts
            stream = self.container.streams[self.index.header.stream]
            with suppress(*DECODER_ERRORS):
                self.container.seek(position, stream=stream, unsupported_byte_offset=by_byte)
                for packet in itertools.islice(packets, SEEK_WITHIN):
                    found = packet.pos if by_byte else packet.dts
                    if (found, packet.size, zlib.crc32(packet)) == (position, size, crc):
                        return self._compared(itertools.chain([packet], packets), start), context
            packets, context = self._open()  # seeking failed: read from the start
        return self._compared(itertools.islice(packets, start, None), start), context

    def _open(self) -> tuple[Iterator[av.Packet], av.VideoCodecContext]:
        if self.container is not None:
            self.container.close()
        self.container = open_container(self.range)
        stream = self.container.streams[self.index.header.stream]
        stream.codec_context.thread_count = self.threads
        return _demux(self.container, stream), stream.codec_context

    def _compared(self, packets: Iterator[av.Packet], start: int) -> Iterator[tuple[int, av.Packet]]:
        sizes, crcs = self.index.packets["size"], self.index.seek["crc"]
        # range comes first, so that zip takes no extra packet.
        for number, packet in zip(range(start, len(sizes)), packets):  # noqa: B905
            if (packet.size, zlib.crc32(packet)) != (sizes[number], crcs[number]):
                raise MediaError(self.path, f"packet {number} differs from the one that was indexed")
            yield number, packet

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.container is not None:
            self.container.close()
        self.file = self.container = self.decoder = None


# --- files that stay open

KEPT = 8  # files per process
KEPT_PIXELS = 2**24  # of one frame of each of them together: eight of 1080p
_kept: OrderedDict[tuple, FrameSource] = OrderedDict()  # by file and its version; the one used last comes last
_kept_lock = threading.Lock()


def open_source(path: str | Path | FileRange, threads: int = 1) -> FrameSource:
    """The source of a path: one that was kept, if its file, tar or object has not changed since. Raises MediaError."""
    file = as_range(path)
    if not file.version:  # by which to find it again
        return FrameSource(file, build(file), threads)
    name = os.path.abspath(file.file) if file.is_plain else file.name
    version = (name, *file.inode, *file.version, cache_folder())
    if threads == 1:
        with _kept_lock:
            source = _kept.pop(version, None)
        if source is not None:
            return source
    source = FrameSource(file, open_index(file), threads)
    # Not kept: decoders with threads, which do not survive a fork, and files that the demuxer reads.
    source.version = version if threads == 1 and source.index.seek is None else None
    return source


def keep_source(source: FrameSource) -> None:
    """Keep a source that was read from open for the next reader of its file, and close those not used for longest.

    Each process keeps its own.
    """
    if source.version is None or source.file is None:
        source.close()
        return
    with _kept_lock:
        closed = [_kept.pop(source.version)] if source.version in _kept else []
        _kept[source.version] = source
        while len(_kept) > KEPT or sum(math.prod(kept.index.header.stored) for kept in _kept.values()) > KEPT_PIXELS:
            closed.append(_kept.popitem(last=False)[1])
    for old in closed:
        old.close()


def close_kept_sources() -> None:
    """Close all files that were kept open."""
    with _kept_lock:
        sources = list(_kept.values())
        _kept.clear()
    for source in sources:
        source.close()


atexit.register(close_kept_sources)
if hasattr(os, "register_at_fork"):  # a thread of the parent may hold the lock while another forks
    os.register_at_fork(
        before=_kept_lock.acquire, after_in_parent=_kept_lock.release, after_in_child=_kept_lock.release
    )


def _numbered(packet: av.Packet, number: int) -> av.Packet:
    packet.pts = packet.dts = number
    return packet


def open_container(path: str | Path | FileRange) -> InputContainer:
    file = as_range(path)
    if not file.is_plain:  # libav reads through Python, and opens nothing itself
        return av.open(file.open(), options=RANGE_OPTIONS, **METADATA)
    # Absolute, because ffmpeg takes the part before a colon for a protocol.
    return av.open(os.path.abspath(file.file), options=OPEN_OPTIONS, **METADATA)


def as_range(path: str | Path | FileRange) -> FileRange:
    return path if isinstance(path, FileRange) else local_range(path)


def _demux(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The non-empty packets of a stream. The demuxer skips all other streams."""
    for other in container.streams:
        if other is not stream and hasattr(other, "discard"):  # PyAV 17 has no such attribute, and reads all streams
            other.discard = DISCARD_ALL
    return (packet for packet in container.demux(stream) if packet.size)


# --- checking and converting frames


def has_alpha(pixels: VideoFormat) -> bool:
    """Whether pixels of a format may be transparent."""
    return pixels.has_palette or any(component.is_alpha for component in pixels.components)


def to_rgb(path: str | Path, frame: VideoFrame, convert: VideoReformatter, keep_alpha: bool = False) -> np.ndarray:
    """[H, W, 3] uint8 (keep_alpha: [H, W, 4]) of a decoded frame as stored, with the file's colour matrix and range.

    All readers use this conversion. Each chroma sample covers its 2x2 (or 2x1) pixels, as in the ffmpeg program for
    8 bits and even sizes; POINT makes swscale do the same for more bits. Resizing follows, so that the position of
    chroma does not depend on the size. Raises MediaError if a pixel is transparent, or, with keep_alpha, if the format
    has no alpha.
    """
    alpha = has_alpha(frame.format)
    kind = "rgba" if alpha else "rgb24"
    with media_errors(path, "cannot be converted to RGB"):
        pixels = convert.reformat(_even(frame), format=kind, interpolation="POINT", threads=1).to_ndarray()
    if keep_alpha:
        if not alpha:
            raise MediaError(path, f"has no alpha channel ({frame.format.name}), which a model of 4 channels needs")
        return pixels[: frame.height, : frame.width]
    if alpha and pixels[..., 3].min() < 255:
        raise MediaError(path, TRANSPARENT)
    return pixels[: frame.height, : frame.width, :3]


def _even(frame: VideoFrame) -> VideoFrame:
    """The frame padded to an even size if chroma is subsampled: swscale would stretch the chroma of odd sizes."""
    height, width, planes = frame.height, frame.width, frame.planes
    halved = len(planes) >= 3 and (planes[1].width, planes[1].height) != (width, height)
    if not halved or not (height % 2 or width % 2):
        return frame
    even = VideoFrame(width + width % 2, height + height % 2, frame.format.name)
    dtype = np.uint16 if max(component.bits for component in frame.format.components) > 8 else np.uint8
    for old, new in zip(planes, even.planes, strict=True):
        pixels = np.frombuffer(old, dtype).reshape(old.height, -1)[:, : old.width]
        right = new.line_size // dtype().itemsize - old.width
        new.update(np.pad(pixels, ((0, new.height - old.height), (0, right)), mode="edge").tobytes())
    even.colorspace, even.color_range = frame.colorspace, frame.color_range
    return even


def check_frame(path: str | Path, frame: VideoFrame, number: int, size: Size) -> None:
    """Raise MediaError if a frame is incomplete, interlaced, or of another size than the first."""
    if frame.is_corrupt:
        raise MediaError(path, f"is damaged: frame {number} does not decode completely")
    if frame.interlaced_frame:
        raise MediaError(
            path,
            f"is interlaced (frame {number} is coded as two fields): convert it with ffmpeg -i IN -vf bwdif OUT, or "
            "-vf setfield=prog if its frames show no combing",
        )
    if (frame.height, frame.width) != tuple(size):
        first, here = (f"{height}x{width}" for height, width in (size, (frame.height, frame.width)))
        raise MediaError(path, f"changes its size at frame {number}, from {first} to {here}")


def _orientation(path: str, frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Header.orientation from the display matrix of the file."""
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    # The stored pixel (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5] / 65536
    straight, turned = ([abs(value) for value in pair] for pair in ((a, d), (b, c)))
    if np.allclose(straight, 1, atol=1e-3) and np.allclose(turned, 0, atol=1e-3):
        return False, bool(d < 0), bool(a < 0)
    if np.allclose(straight, 0, atol=1e-3) and np.allclose(turned, 1, atol=1e-3):
        return True, bool(b < 0), bool(c < 0)
    degrees = math.degrees(math.atan2(b, a))
    raise MediaError(
        path,
        f"has a display matrix ({a:g} {b:g} {c:g} {d:g}) that turns it by {degrees:g} degrees or scales it; only "
        "multiples of 90 degrees and mirrors are supported",
    )


# --- errors


@contextmanager
def media_errors(path: str | Path, what: str) -> Iterator[None]:
    """Raise errors of the demuxer or decoder as MediaError of the file."""
    try:
        yield
    except UserError:  # of this file, or of its store
        raise
    except DECODER_ERRORS as error:
        raise _media_error(path, what, error) from error


def _media_error(path: str | Path, what: str, error: Exception) -> MediaError:
    text = "out of memory" if isinstance(error, MemoryError) else getattr(error, "strerror", None)
    return MediaError(path, f"{what}: {text or one_line(error, 200)}")
