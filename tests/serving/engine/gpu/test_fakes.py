"""Where Triton does not run, the plain forms of the operators do."""

import pytest
import torch

from penumbra.serving.engine import operators, plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_where_triton_does_not_run_the_plain_forms_do_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    assert operators._triton.__wrapped__() is plain
    assert "Triton does not run here" in caplog.text
