"""From a trained model to text: decoding, repairs of wording, the Python API, prediction and submission files."""
