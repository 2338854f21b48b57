"""Fixed encoders that turn a sound into a vector, for the audio and the black-box teachers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from armada_lib.teachers.common import model, pretrained

RATE = 16_000  # Hz, of every sound the encoders see
BANDS, WINDOW, HOP, BINS = 64, 400, 160, 1024  # log_mel: 25 ms every 10 ms, padded for the FFT
LOW, HIGH, FLOOR = 60.0, 7600.0, 1e-8  # Hz, Hz, power relative to the loudest (80 dB below)
CURVES = 10  # cosine coefficients over time, beside mean and standard deviation
WIDTH = BANDS * (CURVES + 2)  # 768
READOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of states (time, width)
    "mean": lambda states: states.mean(0),
    "first": lambda states: states[0],
    "max": lambda states: states.amax(0),
}
Encoder = Callable[[np.ndarray, int], np.ndarray]  # (samples,) and its rate in Hz -> (width,)


def encoder(
    reference: str, revision: str | None = None, readout: str = "mean", device: str = "cpu"
) -> Encoder:
    """A fixed encoder of sounds: "log-mel", or the wav2vec2 checkpoint `reference`, on `device`.

    wav2vec2: the sound at 16 kHz, normalised as the checkpoint asks; its last hidden states over
    time are read by "mean" (A4), "first" or "max". Raises FileNotFoundError for missing weights.
    """
    if reference == "log-mel":
        return log_mel
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    extract = pretrained(Wav2Vec2FeatureExtractor, reference, revision)
    states_of = model(Wav2Vec2Model, reference, revision, device)

    @torch.inference_mode()
    def wav2vec2(waveform: np.ndarray, rate: int) -> np.ndarray:
        values = extract(resample(waveform, rate), sampling_rate=RATE, return_tensors="pt")
        states = states_of(values.input_values.to(device)).last_hidden_state[0]
        return READOUTS[readout](states).float().cpu().numpy()

    return wav2vec2


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """`waveform` (samples,) at `rate` Hz as float32 at 16 kHz.

    Raises ValueError for a sound that is not mono, not finite, silent or too short to summarise.
    """
    from scipy.signal import resample_poly

    wave = np.asarray(waveform, np.float64)
    if wave.ndim != 1:
        raise ValueError(f"a sound must be one row of samples, not shape {wave.shape}")
    if rate <= 0 or len(wave) < rate * (WINDOW + (CURVES + 1) * HOP) / RATE:
        raise ValueError(f"{len(wave)} samples at {rate} Hz are too short to summarise")
    if not np.isfinite(wave).all():
        raise ValueError("some samples of the sound are not finite")
    if np.abs(wave).max() < 1e-6:
        raise ValueError("the sound is silent")
    if rate != RATE:
        shared = int(np.gcd(int(rate), RATE))
        wave = resample_poly(wave, RATE // shared, int(rate) // shared)
    return wave.astype(np.float32)


def log_mel(waveform: np.ndarray, rate: int) -> np.ndarray:
    """768 statistics of the log-mel spectrogram of `waveform` (samples,) at `rate` Hz, float32.

    With P[b, t] the power of mel band b (64 triangles between 60 and 7600 Hz on the scale
    2595 log10(1 + f / 700)) in the Hann window t of T (25 ms every 10 ms, at 16 kHz),
    x[b, t] = log10(max(P[b, t] / max P, 1e-8)), and for every band, in this order:

        mean_t x[b, t];  the standard deviation over t;  and for k = 1 .. 10
        2 / T * sum_t x[b, t] cos(pi k (t + 1/2) / T),

    the shape of the band over the sound's relative time. Loudness does not enter (P / max P), and
    the number of values does not depend on the length. Raises ValueError for a sound that is
    silent, not finite, not mono or shorter than 135 ms.
    """
    from scipy.fft import dct

    x = spectrogram(waveform, rate)
    curves = dct(x, axis=1)[:, 1 : CURVES + 1] / x.shape[1]
    return np.column_stack([x.mean(1), x.std(1), curves]).ravel().astype(np.float32)


def spectrogram(waveform: np.ndarray, rate: int) -> np.ndarray:
    """log10 power (64 mel bands, T windows) relative to the loudest, from -8 to 0; see `log_mel`."""
    from transformers.audio_utils import mel_filter_bank

    bins = BINS // 2 + 1
    filters = mel_filter_bank(bins, BANDS, LOW, HIGH, RATE, norm=None, mel_scale="htk")
    wave = resample(waveform, rate).astype(np.float64)
    frames = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW + 1)[:-1], BINS)) ** 2 @ filters
    return np.log10(np.maximum(power / power.max(), FLOOR)).T
