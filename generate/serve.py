"""The official serve engine, also where torchaudio cannot be imported and without code from the Hub.

    from generate.serve import HiggsAudioServeEngine

Upstream's codec takes one function of torchaudio, whose wheel does not load beside every build of PyTorch; see `import_codec`.
"""

from prepare.audio import import_codec

import_codec()

from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine  # noqa: E402

__all__ = ["HiggsAudioServeEngine"]
