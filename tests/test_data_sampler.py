"""The order of training samples: BasicSR's on every rank, with repeats of their own and a place to start from."""

import basicsr.train
import pytest
import torch
from basicsr.data.data_sampler import EnlargedSampler as Original
from torch.utils.data import DataLoader, Dataset

from moeisr_basicsr.data.repeatable import EnlargedSampler, item_generator
from moeisr_basicsr.data.sampling import draw_queries, draw_scale


class Plain(Dataset):
    """Ten images of some other class."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index


class Drawing(Plain):
    """Ten images whose items depend on epoch and index."""

    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return index % 10, item_generator(0, self.epoch, index).random()


def order(sampler_class, dataset, ranks, rank, ratio, epoch):
    sampler = sampler_class(dataset, ranks, rank, ratio)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(list(sampler))
    return list(sampler)


@pytest.mark.parametrize('ranks', [1, 2, 3])
@pytest.mark.parametrize('ratio', [1, 4, 2.5])
@pytest.mark.parametrize('epoch', [0, 7])
def test_the_order_is_basicsrs_on_every_rank(ranks, ratio, epoch):
    for rank in range(ranks):
        expected = order(Original, Plain(), ranks, rank, ratio, epoch)
        assert order(EnlargedSampler, Plain(), ranks, rank, ratio, epoch) == expected
        own = order(EnlargedSampler, Drawing(), ranks, rank, ratio, epoch)
        assert [index % 10 for index in own] == expected
        assert len(set(own)) == len(own)


@pytest.mark.parametrize('ranks', [2, 4])
def test_the_ranks_together_are_the_single_process(ranks):
    alone = order(EnlargedSampler, Drawing(), 1, 0, 4, 3)
    parts = [order(EnlargedSampler, Drawing(), ranks, rank, 4, 3) for rank in range(ranks)]
    assert [index for group in zip(*parts) for index in group] == alone


def test_epochs_reach_the_dataset_and_change_order_and_draws():
    dataset = Drawing()
    sampler = EnlargedSampler(dataset, 1, 0, 2)
    sampler.set_epoch(1)
    assert dataset.epoch == 1
    first = [dataset[index] for index in sampler]
    sampler.set_epoch(2)
    second = [dataset[index] for index in sampler]
    assert [image for image, _ in first] != [image for image, _ in second]
    assert not {draw for _, draw in first} & {draw for _, draw in second}
    assert len({draw for _, draw in first}) == 20  # the two repeats of an image too
    sampler.set_epoch(1)
    assert [dataset[index] for index in sampler] == first


@pytest.mark.parametrize('ranks, rank', [(1, 0), (2, 1)])
def test_an_epoch_can_start_in_its_middle(ranks, rank):
    sampler = EnlargedSampler(Drawing(), ranks, rank, 3)
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.start = 4
    assert list(sampler) == whole[4:] and len(sampler) == len(whole)
    rest = list(DataLoader(sampler.dataset, 2, sampler=sampler, drop_last=True, collate_fn=len))
    assert len(rest) == (len(whole) - 4) // 2
    sampler.set_epoch(5)
    assert sampler.start == 0 and len(list(sampler)) == len(whole)


def test_importing_the_package_gives_it_to_basicsrs_loop():
    assert basicsr.train.EnlargedSampler is EnlargedSampler and issubclass(EnlargedSampler, Original)


def test_generators_differ_in_each_of_the_three_numbers():
    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1, 2) for index in (0, 1, 2)]
    draws = {key: item_generator(*key).integers(2**62) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert item_generator(1, 2, 10**9).integers(2**62) == item_generator(1, 2, 10**9).integers(2**62)


def test_the_draws_of_a_known_item_stay_what_they_are():
    """A run that is resumed after an update must draw as before."""
    assert [int(value) for value in item_generator(3, 5, 7).integers(1000, size=4)] == [313, 999, 154, 583]


def test_scales_are_uniform_and_queries_are_all_pixels_alike():
    scales = torch.tensor([draw_scale(item_generator(0, 0, index), (1, 4), True) for index in range(3000)])
    counts = torch.histc(scales[:, 0], 6, 1, 4)
    assert scales.min() >= 1 and scales.max() <= 4 and counts.min() > 400  # 500 each, +- 21
    assert abs(torch.corrcoef(scales.T)[0, 1]) < 0.06
    patch = torch.arange(64, dtype=torch.uint8).reshape(8, 8, 1).numpy()
    hits = torch.zeros(64)
    for index in range(2000):
        taken = (draw_queries(item_generator(1, 0, index), patch, 16)['gt'][:, 0] * 255).round().long()
        assert len(set(taken.tolist())) == 16
        hits[taken] += 1
    assert hits.min() > 400 and hits.max() < 600  # 500 each, +- 19
