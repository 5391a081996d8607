"""Observations on the committed run of the study classification.py, by section: written by hand, for its sizes."""

OVERVIEW = """
| figure | the claim | here |
|---|---|---|
| BGN, Table 2 | BN falls in small batches, GN does not | shows, weakly: from 8 to 2 BN -2.0, GN +0.5 |
| | BGN is best at every size | the best mean at 128, second at 32; from 8 to 2 behind BN by 2 to 4 |
| Four Things, Fig. 1 | a small α improves BN, a larger one small batches | the best α grows; no gain beyond the seeds |
| Fig. 2 | an α just below 1 improves GN | does not show |
| Fig. 3 | an intermediate ghost size is best | the means have that shape, within the seeds |
| Fig. 4 | α gains more, the smaller the groups | shows: 0.4 at 2, nothing above |
| Fig. 5 | all four together beat BN and GN at every batch size | GN but for 2, by up to 8; not BN |
| §3.3 | decay of γ and β helps models that overfit | does not show |
| Table 1 | few classes: α removes 20 % of the error, GhostBN does as well as BRN | shows with two classes |
| | … GBGN loses nothing | does not show |
| Ghost Normalization, Table 1 | GhostBN beats BN by 0.7 | 0.3, within the seeds |
| | SeqNorm beats BN by 1.7 | shows: 1.5 |
| Figs. 4, 5 | GhostBN makes the loss rougher than BN | [weakly, not in a residual network](landscape.md) |
| Batch Renorm, Fig. 1 | in batches of 32 BRN is as good as BN | behind by 1.1 after 9 epochs, by 2.1 after 3 |
| Fig. 2 | in micro-batches of 4 BRN is better than BN | does not show: BN loses nothing by them |
| Fig. 3 | few classes cost BN 11 points, and BRN none | BN 13; BRN has 5 to 6 of them back |
"""

COMMENTS = {
    "rate": "The best of four, by less than the seeds differ.",
    "batch size": """
*The papers.* Batch Group Normalization, Table 2: from batch 128 to 2, BN falls from 76.8 to 66.5 and GN stays at
76; BGN is best at every size, and GBGN 4.2 points below it at 2. *Four Things*, §3.4: at 2, GBGN with α beats GN.
Batch Renorm: as good as BN at 32, better in micro-batches of 4. *Ghost Normalization*: SeqNorm beats BN and
GhostBN.

*Shows here.* From 8 to 2, BN loses 2.0 points and GN gains half a point; at 2, recomputing gives BN 0.4 back and α
0.7. BRN is behind BN down to batch 8, and ahead at 4 and 2 by about as much as the seeds differ. SeqNorm has the
best mean, at 4 the second best; it is clearly ahead of BN at 2 only, by 1.0 ± 0.4 over the same seeds.

BGN, whose pieces there are parts of channels, has the best mean at 128, 1.5 above BN, and the second at 32.

*Does not show.* BN is no worse than GN even at 2. BGN is worse than BN at 8, 4 and 2, by 2.2 to 3.6 points: merging
channels costs more here than noisy statistics. GBGN, with α too, is no better than GN; yet its mean is above BGN's
at 4 and 2. GhostBN is never ahead of BN.

*Mind.* Equally many images are 70 steps at batch 128 and 4500 at 2. All but BGN are worst at 128, where steps are
fewest, GN and GBGN by far. BRN at 128 is an artefact: its first part, plain BatchNorm, is 3 steps, after which the
moving statistics still remember where they began; with 40 % of the steps instead, its worst seed reaches 75.5 for
51.1 (a separate trial).
""",
    "all four": """
*The paper.* *Four Things*, Fig. 5: GhostBN, α, decay of γ and β, and GBGN at 2 together are best at every batch
size, by up to 6.5 points on Caltech-256.

*Here* they are ahead of GN at all sizes but 2, by 2 to 8 points, and never ahead of BN, as none of the four gains much
by itself. From 8 to 4 and 2 BN loses less here than there.
""",
    "ghost size": """
*The paper.* *Four Things*, Figs. 3 and 4: an intermediate size is best, by 0.84 on CIFAR-100 and 5.8 on
Caltech-256; no gain on SVHN, where models overfit little. Example weighing gains more, the smaller the groups.

*Here* the means have the claimed shape: they rise from 83.2 to 83.7 at 4 and fall at 2. But the rise, 0.5 ± 0.35
over the same seeds, is no more than three seeds can differ; nor does this model overfit much (seed 0 of BN has 88.6
% of its training images right). Example weighing does as claimed: the α that validation chooses grows from 0 to 0.1
at 128 to 0.4 at 2, where it gains 0.4; at other sizes it gains nothing, or loses up to 0.3 by the choice.
""",
    "SeqNorm": """
*The paper.* *Ghost Normalization*, Table 1, CIFAR-100: GhostNorm improves BN by 0.7, SeqNorm by 1.7.

*Shows here.* SeqNorm is ahead of BN with every number of channel groups, most with 8 and 16: by 2.5 points on the
validation set, by 1.5 on the test set, three times what the seeds differ. GhostBN is ahead by 0.3 at most, within
the seeds.
""",
    "α": """
*The paper.* *Four Things*, Figs. 1 and 2: a small α improves BN in accuracy and loss, a larger one in smaller
batches; and an α just below 1, a trace of the moving averages, improves models trained with GN.

*Here* the best α does grow as the normalization batch shrinks: 0 for 128, 0.02 to 0.1 for 8. The gain, 0.1 points,
is less than the seeds differ, and the loss falls by 0.001 at most. A large α costs much: at 1, InstanceNorm, BN of
batch 128 has 30 % left. The claim on GN does not show: nothing is better than α = 1, though 0.97 costs only 0.1
points. GBGN, for which *Four Things* uses α, gains on every seed: on average 0.6 points, and 0.013 in loss, at α =
0.4.
""",
    "decay": """
*The paper.* *Four Things*, §3.3: in residual networks that overfit, decay of γ and β gains 0.3 points on CIFAR-100
and 0.9 on Caltech-256; whether γ decays to 0 or 1 does not matter.

*Does not show here*, though the model overfits (seed 0: 98 % of the training images right). No decay beats none;
decay to 0 costs 0.3 to 0.4 points, where the standard error over five seeds is 0.1. At 1e-2, decay to 1 costs
nothing, so the target does matter. 470 steps are few for a decay to act in, and the network is small.
""",
    "few classes": """
*The papers.* Batch Renorm, §4.3, two images each of 16 of 1000 classes: BN falls from 78.3 to 67.0, but not in
equally composed minibatches under their own statistics; 77.4 if a group has each class once, 78.6 with renorm.
*Rethinking "Batch"*, Fig. 8: random minibatches and recomputed statistics do not help, GhostBN over different
classes does. *Four Things*, Table 1, four of 100 classes: α removes 20 % of the error, GhostBN does as well as BRN,
GBGN loses nothing.

*Shows here*, with two classes. BN loses 13 points, of which equally composed minibatches have 8 back: it reads
labels from its batch. Random minibatches and recomputed statistics have 2 back; α = 0.2 has 5, 18 % of the error,
without training. BRN, GhostBN, SeqNorm and frozen statistics have 4 to 6, GhostBN as many as BRN. α adds nothing to
BRN.

*Does not show.* None is near i.i.d. accuracy. GN, which no other image can reach, loses 10 points too, so much of
the loss may be that of SGD on two classes a step. GBGN loses 12 points, and BGN has the lowest accuracy. GhostBN is
no better for having each class once: of 10 classes, groups of 2 or 4 in any order do as well or better. With four
classes no leak is seen: equally composed minibatches are worse than population statistics, BN loses 2.4 points,
less than GN, and GhostBN in any order has 0.9 of them back. Disjoint halves cost BN 0.2, within the seeds, and
GhostBN of halves nothing.
""",
    "renorm": """
*The paper.* Fig. 1: with minibatches of 32, BRN is as good as BN. Fig. 2: in micro-batches of 4, it learns faster
and ends higher than BN. Fig. 3: see above.

*Shows here.* Of two classes, BN ends at 72.0 %, and at 80.5 in minibatches that are composed as in training, and
83.0 on the training minibatches themselves: it has learned to read them. BRN ends at 77.9, GhostBN of different
classes at 76.4.

*Does not show.* With usual minibatches BRN stays 1.0 point below BN after the first epochs. In micro-batches of 4 BN
is as good as in batches of 32 (85.2 and 85.0), so there is nothing for BRN to win back, and it is 0.8 below.
""",
}
