"""What a GPU does with this package, measured: `python -m u2a_fast.gpu_report --minutes 10 --out report/`."""
