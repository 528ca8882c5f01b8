"""The lab that studies Interleaved Head Attention: experiments, evaluation, benchmarks, `iha`."""

__version__ = "0.1.0"
