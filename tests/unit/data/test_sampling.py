import nibabel as nib
import numpy as np
import pytest
import torch

from medvisionllama.config import AugmentConfig, DataConfig
from medvisionllama.data.cache import PseudoLabelledCase, build_cache
from medvisionllama.data.fingerprint import fingerprint
from medvisionllama.data.index import open_dataset
from medvisionllama.data.normalisation import fit_normalisation
from medvisionllama.data.planning import make_plan
from medvisionllama.data.sampling import BatchSampler
from medvisionllama.errors import ConfigError

OFF = AugmentConfig(enabled=False)
STILL = AugmentConfig(spatial_probability=0, intensity_probability=0)


@pytest.fixture
def sampler(dataset_folder, tmp_path):
    """Make a sampler over six phantoms, with the crop and settings asked for."""
    dataset = open_dataset(dataset_folder(values=(2, 5)))
    plan = make_plan(dataset, fingerprint(dataset), DataConfig(), flip=True, patch_size=None)
    cases = build_cache(dataset.cases, plan, folder=tmp_path / "cache")

    def make(
        crop=(16, 16, 8), augment=OFF, foreground_share=0.5, batch_size=2, seed=0, merged=False, **ranks
    ) -> BatchSampler:
        changed = plan.model_copy(
            update={
                "crop_size": crop,
                "merged": merged,
                "flip_axes": () if augment is STILL else plan.flip_axes,
                "normalisation": fit_normalisation(cases, plan.channel_rules),
            }
        )
        data = DataConfig(foreground_share=foreground_share)
        return BatchSampler(cases, changed, data, augment, batch_size=batch_size, seed=seed, **ranks)

    return make


def test_a_batch_has_the_shape_and_types_of_training(sampler):
    images, labels = sampler(augment=AugmentConfig()).batch(0)
    assert (tuple(images.shape), images.dtype) == ((2, 1, 16, 16, 8), torch.float32)
    assert (tuple(labels.shape), labels.dtype) == ((2, 16, 16, 8), torch.int64)


def test_a_batch_is_a_function_of_seed_and_step_alone(sampler):
    fresh, used = sampler(augment=AugmentConfig()), sampler(augment=AugmentConfig())
    for step in (0, 1, 2):
        used.batch(step)
    for wanted, got in zip(fresh.batch(7), used.batch(7), strict=True):
        assert torch.equal(wanted, got)


@pytest.mark.parametrize("other", [{"seed": 1}, {"rank": 1, "num_ranks": 2}])
def test_another_seed_or_rank_gives_another_batch(sampler, other):
    assert not torch.equal(sampler().batch(3)[0], sampler(**other).batch(3)[0])


def test_crops_of_pseudo_labelled_cases_come_in_their_share(sampler):
    alone, both = sampler(batch_size=4, pseudo_share=0.5), sampler(batch_size=4, pseudo_share=0.5)
    both.pseudo_labelled = both.cases[:2]
    taken = [case for step in range(100) for case in both._cases(step)]
    own = [case for step in range(100) for case in alone._cases(step)]
    changed = [case for case, before in zip(taken, own, strict=True) if case is not before]
    # A third of those drawn is what would have come anyway.
    assert 0.35 * len(taken) < len(changed) * 6 / 5 < 0.65 * len(taken)
    assert set(map(id, changed)) == set(map(id, both.cases[:2]))
    both.pseudo_labelled = ()
    assert torch.equal(both.batch(3)[0], alone.batch(3)[0])


def test_another_step_gives_another_batch(sampler):
    assert not torch.equal(sampler().batch(0)[0], sampler().batch(1)[0])


def test_an_epoch_shows_every_case_once_in_a_new_order(sampler):
    made = sampler()
    epochs = [[n for step in range(3 * e, 3 * e + 3) for n in made._case_numbers(step)] for e in range(4)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


@pytest.mark.parametrize(
    "augment",
    [
        OFF,
        AugmentConfig(),
        AugmentConfig(elastic=0.05, elastic_probability=1, bias_field=0.6, bias_field_probability=1),
    ],
)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_shares_of_a_batch_are_the_batch_of_one_process(sampler, augment, num_ranks):
    one = sampler(augment=augment, batch_size=4)
    shares = [
        sampler(augment=augment, batch_size=4, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)
    ]
    for step in range(5):
        images, labels = zip(*(made.batch(step) for made in shares), strict=True)
        assert [len(share) for share in images] == [4 // num_ranks] * num_ranks
        assert torch.equal(torch.cat(images), one.batch(step)[0])
        assert torch.equal(torch.cat(labels), one.batch(step)[1])


def test_processes_that_cannot_share_a_batch_are_refused(sampler):
    with pytest.raises(ConfigError, match=r"batch_size=3 .* their number, 2; .*batch_size=2"):
        sampler(batch_size=3, num_ranks=2)


def test_a_batch_larger_than_the_dataset_wraps_into_the_next_epoch(sampler):
    made = sampler(batch_size=8)
    assert sorted(made._case_numbers(0)[:6]) == list(range(6))
    assert len(made.batch(0)[0]) == 8


def test_label_values_become_class_numbers(sampler):
    labels = torch.cat([sampler(foreground_share=1.0).batch(step)[1] for step in range(6)])
    assert labels.unique().tolist() == [0, 1, 2]


def test_label_and_image_come_from_the_same_place(sampler):
    images, labels = sampler(foreground_share=1.0, batch_size=6).batch(0)
    means = [images[:, 0][labels == number].mean().item() for number in range(3)]
    assert means[0] < means[1] < means[2]


def test_merged_classes_are_one(sampler):
    labels = torch.cat([sampler(merged=True, foreground_share=1.0).batch(step)[1] for step in range(6)])
    assert labels.unique().tolist() == [0, 1]


def test_foreground_crops_are_centred_on_a_class_and_classes_take_turns(sampler):
    made = sampler(crop=(6, 6, 6), foreground_share=1.0)
    middles = torch.cat([made.batch(step)[1][:, 3, 3, 3] for step in range(30)])
    counts = torch.bincount(middles, minlength=3).tolist()
    assert counts[0] == 0
    assert min(counts[1:]) > 15


def test_crops_anywhere_are_mostly_background(sampler):
    made = sampler(crop=(6, 6, 6), foreground_share=0.0)
    middles = torch.cat([made.batch(step)[1][:, 3, 3, 3] for step in range(30)])
    assert (middles == 0).sum() > 15


def test_foreground_crops_are_still_centred_when_augmented(sampler):
    made = sampler(crop=(6, 6, 6), foreground_share=1.0, augment=AugmentConfig(translation=0))
    middles = torch.cat([made.batch(step)[1][:, 2:4, 2:4, 2:4].flatten(1).amax(1) for step in range(20)])
    assert middles.min() > 0


def test_crops_stay_inside_scans_that_are_large_enough(sampler):
    images, _ = sampler(crop=(16, 16, 16), batch_size=6).batch(0)
    assert images.ne(0).all()


def test_a_small_scan_is_padded_with_zero_and_background(sampler):
    images, labels = sampler(crop=(32, 32, 24)).batch(0)
    assert images[:, :, :4].eq(0).all()
    assert labels[:, :4].eq(0).all()
    assert images[:, :, 10:20, 10:20, 10:14].ne(0).all()


@pytest.mark.parametrize("crop", [(32, 32, 24), (33, 29, 21)])
def test_a_small_scan_lies_where_the_sliding_window_puts_it(sampler, crop):
    made = sampler(crop=crop, batch_size=1)
    for case in made.cases:
        made.cases = [case]
        images, _ = made.batch(0)
        for axis, (length, size) in enumerate(zip(crop, case.image.shape[1:], strict=True), start=2):
            filled = images.ne(0).movedim(axis, 0).flatten(1).any(dim=1).nonzero().flatten()
            assert (int(filled[0]), len(filled)) == ((length - size) // 2, size)


@pytest.mark.parametrize("crop", [(16, 16, 8), (12, 10, 4), (20, 12, 6), (8, 14, 2)])
def test_augmentation_that_changes_nothing_gives_the_plain_crop(sampler, crop):
    plain, still = sampler(crop=crop).batch(4), sampler(crop=crop, augment=STILL).batch(4)
    torch.testing.assert_close(still[0], plain[0], atol=1e-4, rtol=0)
    assert torch.equal(still[1], plain[1])


def test_cases_without_labels_are_cut_anywhere(dataset_folder, write_nifti, tmp_path):
    root = dataset_folder(num_cases=1)
    dataset = open_dataset(root)
    found = fingerprint(dataset)
    write_nifti(dataset.cases[0].label, np.zeros(found.shapes["case_000"]), dtype=np.uint8)
    plan = make_plan(dataset, found, DataConfig(crop_size=(8, 8, 8)), flip=False, patch_size=None)
    cases = build_cache(dataset.cases, plan, folder=tmp_path / "cache")
    plan = plan.model_copy(update={"normalisation": fit_normalisation(cases, plan.channel_rules)})
    made = BatchSampler(cases, plan, DataConfig(foreground_share=1.0), OFF, batch_size=2, seed=0)
    images, labels = made.batch(0)
    assert images.ne(0).all()
    assert labels.eq(0).all()


def test_crops_within_an_organ_hold_no_padding(write_nifti, tmp_path):
    label = np.full((72, 72, 72), 2, np.uint8)
    label[24:48, 24:48, 24:48] = 1
    root = tmp_path / "data"
    write_nifti(root / "images" / "a1.nii.gz", label + 1.0, dtype=np.float32)
    write_nifti(root / "labels" / "a1.nii.gz", label)
    dataset = open_dataset(root)
    plan = make_plan(
        dataset, fingerprint(dataset), DataConfig(crop_size=(16, 16, 16)), flip=False, patch_size=None
    )
    cases = build_cache(dataset.cases, plan, folder=tmp_path / "cache")
    update = {"classes": {1: "a", 2: "b"}, "normalisation": fit_normalisation(cases, plan.channel_rules)}
    settings = DataConfig(foreground_share=1.0), AugmentConfig(elastic=0.05)
    sampler = BatchSampler(cases, plan.model_copy(update=update), *settings, batch_size=4, seed=0)
    crops = [crop for step in range(60) for crop in sampler.batch(step)[1]]
    # Of the middle of the scan, so far from its end that all around is labelled.
    background = [float((crop == 0).float().mean()) for crop in crops if crop[8, 8, 8] == 1]
    assert len(background) > 60
    assert np.mean(background) < 0.002
    assert max(background) < 0.05


def test_a_class_that_one_case_has_gets_its_turns(sampler, dataset_folder, tmp_path):
    even = sampler(foreground_share=1.0, batch_size=6)
    root = dataset_folder("rare", values=(2, 5))
    dataset = open_dataset(root)
    for case in dataset.cases[1:]:
        label = nib.load(case.label)
        voxels = label.get_fdata().astype(np.uint8)
        nib.save(nib.Nifti1Image(voxels * (voxels == 2), label.affine), case.label)
    cases = build_cache(dataset.cases, even.plan, folder=tmp_path / "cache")
    rare = BatchSampler(cases, even.plan, DataConfig(foreground_share=1.0), OFF, batch_size=6, seed=0)
    rng = np.random.default_rng(0)
    places = [rare._place(case, rng) for step in range(200) for case in rare._cases(step)]
    on_rare = sum(int(case.label[tuple(centre)] == 5) for case, centre in places) / len(places)
    # Half of the crops go to the two classes alike; of the others a sixth is the one case's, half of it this class.
    assert on_rare == pytest.approx(0.5 / 2 + 0.5 / 6 / 2, abs=0.05)
    # Nothing changes where every case has every class, or with crops that may lie anywhere.
    assert even.class_first_share == 0
    elsewhere = BatchSampler(cases, even.plan, DataConfig(foreground_share=0.0), OFF, batch_size=6, seed=0)
    assert elsewhere.class_first_share == 0
    merged = even.plan.model_copy(update={"merged": True})
    assert BatchSampler(cases, merged, DataConfig(), OFF, batch_size=6, seed=0).class_first_share == 0
    # Scans with masks of the network's own are not traded for it.
    other = PseudoLabelledCase(**vars(cases[1]), masks=cases[1].folder)
    assert {id(rare._place(other, rng)[0]) for _ in range(50)} == {id(other)}


def test_a_structure_of_three_voxels_among_sixty_classes_is_found(write_nifti, tmp_path):
    rng = np.random.default_rng(0)
    label = np.zeros((40, 40, 40), np.uint8)
    label[8:32, 8:32, 8:32] = np.arange(1, 61)[rng.integers(0, 60, (24, 24, 24))]
    label[label == 60] = 1
    label[3, 3, 3:6] = 60
    root = tmp_path / "data"
    write_nifti(root / "images" / "a1.nii.gz", rng.normal(size=label.shape), dtype=np.float32)
    write_nifti(root / "labels" / "a1.nii.gz", label)
    dataset = open_dataset(root)
    plan = make_plan(
        dataset, fingerprint(dataset), DataConfig(crop_size=(16, 16, 16)), flip=False, patch_size=None
    )
    cases = build_cache(dataset.cases, plan, folder=tmp_path / "cache")
    assert len(cases[0].centres) <= 60 * 1000
    assert sorted(map(tuple, cases[0].centres[cases[0].centres[:, 0] == 60][:, 1:].tolist())) == [
        (3, 3, 3), (3, 3, 4), (3, 3, 5)
    ]  # fmt: skip
    plan = plan.model_copy(
        update={
            "classes": {value: str(value) for value in range(1, 61)},
            "normalisation": fit_normalisation(cases, plan.channel_rules),
        }
    )
    sampler = BatchSampler(cases, plan, DataConfig(foreground_share=1.0), OFF, batch_size=2, seed=0)
    batches = [sampler.batch(step)[1] for step in range(200)]
    # One class of sixty is drawn once in sixty crops; without turns it would be three voxels of 13,000.
    assert sum(int((labels == 60).any()) for labels in batches) >= 5
