"""Building the index of a video (see video_index.py): reading its packets, and finding the order of its frames."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from vae3d.data.decoding.containers import demux, media_errors, open_container, set_number
from vae3d.data.decoding.frame_source import BYTE_SEEK, KEYS_BACK, FrameSource
from vae3d.data.decoding.frames import check_frame, has_alpha, orientation_of, to_rgb
from vae3d.data.decoding.video_index import FRAME, MIN_ASPECT, PACKET, SEEK, Decoder, Header, VideoIndex
from vae3d.data.media import MediaError, MediaInfo
from vae3d.data.storage.files import FileRange, RangeFile

# Containers that store presentation times, and codecs with one frame per packet. Not VP8, which has packets without a
# frame, and not MPEG-1, -2 and -4, with open groups at the start and uncoded frames.
TIMED = {"mov", "matroska", "mpegts", "flv"}
ONE_FRAME = {"h264", "hevc", "av1", "vp9", "ffv1"}
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic
MATROSKA_UNIT = Fraction(1, 1000)  # second
RATES = [Fraction(n) for n in (8, 10, 12, 15, 16, 20, 24, 25, 30, 48, 50, 60, 90, 100, 120)]
RATES += [Fraction(n * 1000, 1001) for n in (12, 15, 24, 30, 48, 60, 120)]
CHECKED = 8  # frames at the beginning whose order is compared with the timestamps


def build(file: FileRange) -> VideoIndex:
    """The index of a video.

    Reads all packets, and decodes as much as it takes to confirm the order of frames: the beginning; or the whole file,
    twice, if timestamps are missing, repeat, run backwards or are made up by the container.
    Raises MediaError if the file is damaged, or has content that cannot be read faithfully.
    """
    path = file.name
    with media_errors(path, "is not a readable video"), closing(open_container(file)) as container:
        names = set(container.format.name.split(","))
        stream = _video_stream(path, container)
        packets = _read_packets(file, container, stream, names)
        context = stream.codec_context
        _check_sdr(path, context.color_trc)  # as the container says; some decoders pass on only what the frames say
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
    orientation, stored = orientation_of(path, first_frame), (first_frame.height, first_frame.width)
    if not MIN_ASPECT <= aspect <= 1 / MIN_ASPECT:
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
        for packet in demux(container, stream):
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
    """Raise MediaError if the container's header says that the file should be longer, or if it ends in zeros."""
    if "mov" in names and packets < len(stream.index_entries):  # an edit list may exclude some
        promised = sum(entry.size > 0 for entry in stream.index_entries)
        if packets < promised:
            raise MediaError(path, f"is cut short: its header promises {promised} frames, {packets} are there")
    end, size = _promised_end(file, names), file.size
    if end is not None and end > size:
        raise MediaError(path, f"is cut short: its header promises {end} bytes, {size} are there")
    if "mov" not in names and stream.codec_context.name != "rawvideo":  # whose zeros are black
        count = min((end or size) // 8, 2**16)
        if not any(file.pread(count, (end or size) - count)):
            raise MediaError(path, f"is incomplete: it ends in {count} zeros or more, as after an interrupted download")


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
        packets = itertools.islice(demux(container, stream), start, None)
        for number, packet in enumerate(itertools.chain(packets, [None]), start):  # None gives the last frames
            try:
                with media_errors(path, f"is damaged: packet {number} cannot be decoded"):
                    frames = stream.codec_context.decode(packet and set_number(packet, number))
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
                _check_sdr(path, frame.color_trc)
            check_frame(path, frame, len(shown), (first_frame.height, first_frame.width))
            shown.append(frame.pts)
            hashes.append(zlib.crc32(np.ascontiguousarray(to_rgb(path, frame, convert, has_alpha(frame.format)))))
            if enough(shown):
                break
    if first_frame is None:
        raise MediaError(path, "holds no frame that can be decoded")
    return first_frame, shown, hashes


def _check_sdr(path: str, transfer: int) -> None:
    """transfer: an AVColorTransferCharacteristic. Raises MediaError."""
    if name := HDR_TRANSFERS.get(int(transfer)):
        raise MediaError(path, f"is HDR ({name}); tone-map it to SDR first, 8-bit RGB would look washed out")


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
    standard = sorted(RATES, key=lambda rate: abs(rate - mean))
    attempts = [(rate, unit) for rate in [*known, *standard]]  # times are rounded to the unit of the container
    if not (ticks * 1000 * unit.numerator % unit.denominator).any():
        attempts += [(rate, MATROSKA_UNIT) for rate in [*standard, *known]]  # copied from one of whole milliseconds
    for rate, rounded in attempts:
        if np.abs(ticks * float(unit * rate) - np.arange(len(ticks))).max() <= 1.001 * float(rounded * rate):
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
