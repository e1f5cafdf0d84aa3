"""The ADM suite's scores without TensorFlow: `python -m gpu_eval.fid REF.npz SAMPLE.npz`."""
