"""What only the built model shows to be wrong, before the first step."""

import pytest
import tiny

import domainnorm as dn
from domainnorm.engine.check import check_model


@pytest.mark.parametrize("head", ["BOX", "MASK"])
def test_pieces_that_do_not_divide_the_features_of_a_roi_are_refused(tmp_path, head):
    keys = {f"MODEL__ROI_{head}_HEAD__NORM": "BGN", f"MODEL__ROI_{head}_HEAD__POOLER_RESOLUTION": 7}
    keys |= {"MODEL__ROI_BOX_HEAD__NUM_CONV": 1, "MODEL__NORM__BGN__NUM_GROUPS": 512}
    cfg = tiny.config(tiny.write_dataset(tmp_path, count=2), tmp_path, **(tiny.MASK_RCNN | keys))
    model = dn.build_model(cfg)
    with pytest.raises(dn.UserError, match=r"512 does not divide the \d+ x 7 x 7 features of roi_heads\..*SPLIT_SPACE"):
        check_model(cfg, model)
