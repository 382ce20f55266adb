"""The words of the stories, as slots: what can be drawn, in which forms, how often, and what depends on what.

Lists are in order of frequency. Their weights fall off gently (a shifted Zipf law): a first mention is surprising, so
that remembering it pays, and still the last word of a list is seen often enough to be learned from some ten thousand
stories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from transformerlm.corpus.grammar import Entry, Slot, Weighted

_VOWEL_LETTER_BUT_CONSONANT_SOUND = ("uni", "use", "eu", "one", "uku")
_CONSONANT_LETTER_BUT_VOWEL_SOUND = ("honest", "hour")


def word(it: str, **forms: str) -> Entry:
    """An entry with its base form `it`, the indefinite `a`, any further forms, and each of them capitalised."""
    forms = {"it": it, "a": f"{_article(it)} {it}", **forms}
    return forms | {name.capitalize(): text[0].upper() + text[1:] for name, text in forms.items()}


def _article(text: str) -> str:
    if text.startswith(_CONSONANT_LETTER_BUT_VOWEL_SOUND):
        return "an"
    return "an" if text[0] in "aeiou" and not text.startswith(_VOWEL_LETTER_BUT_CONSONANT_SOUND) else "a"


def noun(it: str) -> Entry:
    if it.endswith(("s", "x", "ch", "sh")):
        return word(it, plural=f"{it}es")
    if it.endswith("y") and it[-2] not in "aeiou":
        return word(it, plural=f"{it[:-1]}ies")
    return word(it, plural=f"{it}s")


def she(it: str) -> Entry:
    return word(it, they="she", them="her", their="her")


def he(it: str) -> Entry:
    return word(it, they="he", them="him", their="his")


def ranked(entries: Iterable[Entry]) -> Weighted[Entry]:
    """A distribution whose weights fall with the rank: of 40, the first is about five times as likely as the last."""
    outcomes = tuple(entries)
    return Weighted(outcomes, tuple(10_000 // (rank + 10) for rank in range(len(outcomes))))


def _slot(name: str, words: str, make: Callable[[str], Entry] = word) -> Slot:
    """A slot over a list: separated by commas if there are any (for phrases), else by white space."""
    return Slot(name, {"": ranked(map(make, _split(words)))})


def _dependent(name: str, given: tuple[str, str], tables: Mapping[str, Iterable[Entry]]) -> Slot:
    return Slot(name, {value: ranked(entries) for value, entries in tables.items()}, given)


def _split(words: str) -> list[str]:
    return [" ".join(item.split()) for item in words.split(",")] if "," in words else words.split()


_GIRLS = """Lily Mia Anna Emma Zoe Rosa Ella Nora Lucy Clara Maya Sara Alice Jane Molly Amy Leah Eva Nina Julia
    Sophie Hannah Kate Lena Tess Vera Wendy Beth Dora Elsa Gwen Heidi Ida Kira Lola Mary Nell Stella Tara Yara"""
_BOYS = """Tom Ben Max Sam Leo Jack Tim Finn Noah Adam Luke Oscar Hugo Felix Peter Paul Henry Oliver Theo Eli Owen
    Jonah David Daniel Simon Martin Victor Walter Arthur Bruno Carl Dylan Edgar Frank George Harry Isaac Jacob Otto
    Ralph"""
_FRIENDLY_GIRLS = """Zara Bella Chloe Edith Fiona Greta Irene Joy Linda Maria Nadia Olga Paula Rita Susan Thea
    Ursula Wilma Yvonne Carmen"""
_FRIENDLY_BOYS = """Anton Boris Cyrus Dean Emil Fred Gus Ivan Joel Kurt Liam Marco Nathan Pablo Quentin Rufus Stefan
    Toby Vincent Zach"""

_PLACES = {
    "woods": "forest woods grove thicket glade clearing",
    "water": "lake river pond beach stream lagoon",
    "farm": "farm orchard meadow barnyard vineyard pasture",
    "town": "market square library station museum arcade",
    "garden": "park garden playground courtyard greenhouse schoolyard",
    "hills": "hill mountain valley cave cliff canyon",
}
_SPOTS = {
    "woods": """under a mossy log, behind a tall fern, inside a hollow oak, beside a prickly bush, among the dry
        leaves, between two roots, near a crooked stump, on a low branch, beneath a giant toadstool, below a spider
        web""",
    "water": """under a wet rock, behind the reeds, inside an upturned boat, beside a sand dune, among the
        seashells, between two logs, near the old pier, on a lily pad, beneath a wooden raft, below the dripping
        dock""",
    "farm": """under a hay bale, behind the red barn, inside a milk pail, beside the scarecrow, among the
        cornstalks, between two haystacks, near the pigpen, on a fence post, beneath a rusty tractor, below the
        apple boughs""",
    "town": """under a long bench, behind the ticket booth, inside a mailbox, beside a stone statue, among the
        crates, between two pillars, near the clock, on a high shelf, beneath a striped awning, below the front
        steps""",
    "garden": """under a rose bush, behind the green hedge, inside a watering can, beside the sandbox, among the
        tulips, between two swings, near the birdbath, on a garden chair, beneath the slide, below the seesaw""",
    "hills": """under a steep ledge, behind a huge boulder, inside a narrow crack, beside a mountain goat, among the
        pebbles, between two peaks, near an echoing cavern, on a flat slab, beneath a lonely pine, below the snow
        line""",
}

SLOTS: dict[str, Slot] = {
    slot.name: slot
    for slot in (
        # Who is in it. Heroes and friends have names of their own, so that a name says which of the two it is.
        _slot("kind", "girl boy"),
        _dependent("hero", ("kind", "it"), {"girl": map(she, _GIRLS.split()), "boy": map(he, _BOYS.split())}),
        _slot(
            "trait",
            """kind brave curious clever gentle cheerful shy silly honest polite patient quiet playful lively
                friendly lazy messy noisy sleepy stubborn daring thoughtful careful bold eager generous grumpy
                dreamy witty humble jolly sensible loyal restless hopeful helpful""",
        ),
        _slot("look", "small tall freckled barefoot strong slim sturdy dimpled nimble rosy pale lanky dainty wiry"),
        _slot("manner", "quiet young timid lonesome graceful cheery sweet joking bashful blushing"),
        _slot(
            "mien",
            """friendly wise famous busy old young retired skillful mysterious jovial absentminded talkative stern
                modest""",
        ),
        _slot(
            "species",
            """dog cat puppy kitten rabbit pony duck goat hamster parrot hen lamb mouse turtle goose pig donkey calf
                piglet duckling gerbil canary ferret rooster""",
        ),
        _slot(
            "pet",
            """Biscuit Pepper Button Pip Rusty Shadow Coco Waffles Ziggy Muffin Patch Bubbles Pickle Snowy Whiskers
                Nibbles Rocket Scout Ginger Fudge Domino Jasper Mango Noodle Peanut Poppy Ripple Sparky Toffee
                Truffle Tumble Wiggles Bandit Bingo Bramble Comet Dusty Fidget Gizmo Lucky""",
        ),
        _slot("coat", "fluffy spotted brown fat skinny striped clumsy furry woolly hungry speckled plump tame frisky"),
        _slot("temper", "lazy lively greedy nosy mischievous gentle clever cuddly grumpy sleepy faithful rowdy"),
        _slot(
            "relative",
            """grandmother grandfather mother father aunt uncle sister brother cousin godmother neighbor teacher""",
        ),
        Slot("title", {"": ranked([she("Mrs"), he("Mr"), she("Miss")])}),
        _slot(
            "surname",
            """Finch Brown Green Wood Stone Potts Hill Bell Marsh Reed Webb Parker Cook Fisher Miller Archer Carter
                Mason Porter Turner Gray Swan Drake Crane Heron Sparrow Fox Wolf Lamb Hare Rivers Brooks Banks
                Meadows""",
        ),
        _slot(
            "job",
            """baker farmer teacher doctor gardener painter tailor fisherman carpenter librarian mailman nurse cook
                driver firefighter potter weaver butcher plumber singer captain sailor shepherd blacksmith barber
                builder miner judge pilot poet dentist shoemaker beekeeper watchmaker""",
        ),
        _slot("friendkind", "girl boy"),
        _dependent(
            "friend",
            ("friendkind", "it"),
            {"girl": map(she, _FRIENDLY_GIRLS.split()), "boy": map(he, _FRIENDLY_BOYS.split())},
        ),
        _slot(
            "creature",
            """hedgehog squirrel owl fox robin badger fawn beaver otter mole raccoon sparrow swallow skunk chipmunk
                weasel toad lizard bat woodpecker bluebird porcupine moth beetle""",
            noun,
        ),
        # Where and when.
        _slot(
            "size",
            """little big cozy tiny tall narrow crooked wooden brick old bright neat shabby round quaint drafty""",
        ),
        _slot(
            "home",
            """house cottage cabin hut farmhouse castle tower flat bungalow mansion wagon treehouse houseboat lodge
                shack""",
        ),
        _slot(
            "landmark",
            """mill bridge church school lighthouse bakery windmill railway fountain chapel quarry dam canal
                crossroads monastery swamp waterfall desert jungle volcano palace ocean prairie airport factory
                harbor""",
        ),
        Slot(
            "place",
            {
                # One of each kind in turn, so that every kind has frequent and rare places.
                "": ranked(
                    word(names[rank], kind=kind)
                    for rank in range(6)
                    for kind, names in ((kind, words.split()) for kind, words in _PLACES.items())
                )
            },
        ),
        _dependent("spot", ("place", "kind"), {kind: map(word, _split(spots)) for kind, spots in _SPOTS.items()}),
        _slot(
            "weather",
            """sunny rainy windy cloudy foggy snowy warm cold stormy misty hot chilly breezy frosty gray mild""",
        ),
        _slot("daytime", "morning afternoon day evening"),
        _slot("month", "May June July March April August October January November December"),
        _slot("weekday", "Saturday Sunday Monday Friday Tuesday Thursday Wednesday"),
        _slot("number", "three five four seven six ten nine eight twelve eleven twenty"),
        _slot("weeks", "two many several countless"),
        _slot(
            "vehicle",
            """train bus boat bicycle car taxi sled truck balloon canoe tram ferry carriage scooter raft cart""",
        ),
        _slot(
            "country",
            """France Spain Italy China Japan India Egypt Brazil Kenya Canada Mexico Norway Poland Greece Peru Chile
                Turkey Sweden""",
        ),
        # Things that are wanted, lost, worn, given and eaten.
        _slot(
            "color",
            """red blue green yellow purple orange pink white black silver golden turquoise crimson violet scarlet
                ivory""",
        ),
        _slot(
            "toy",
            """kite ball doll drum whistle puzzle top yoyo puppet robot marble trumpet teddy rattle hoop jigsaw
                dinosaur spaceship sword crown mask wand compass telescope lantern magnet necklace bracelet ring
                watch umbrella basket bucket shovel ribbon bell""",
        ),
        _slot(
            "treat",
            """apples cookies honey carrots cheese bread soup pancakes nuts grapes cherries berries popcorn noodles
                cake pears peaches plums raisins toast porridge pudding jam corn beans peas melons figs dates
                pretzels crackers butter oatmeal lettuce turnips radishes""",
        ),
        _slot(
            "game",
            """tag catch chess hopscotch cards dominoes checkers soccer tennis leapfrog marbles charades baseball
                badminton""",
        ),
        _slot(
            "hobby",
            """dance, sing, read, paint, swim, climb trees, count stars, collect stamps, tell jokes, chase
                butterflies, draw maps, build forts, skip rope, whistle tunes, fly paper planes, solve riddles,
                watch birds, pick flowers, write letters, roll down slopes""",
        ),
        _slot(
            "moved",
            """walked ran hurried skipped hopped marched raced strolled wandered jogged tiptoed galloped dashed
                trotted""",
        ),
        _slot(
            "sad",
            """sad worried upset lonely gloomy unhappy nervous tired hopeless miserable troubled cross anxious
                ashamed""",
        ),
        _slot(
            "quality",
            """beautiful lovely wonderful special shiny fancy precious perfect magnificent pretty strange splendid""",
        ),
        _slot("state", "gray wounded scared baby white lost black lame wild trembling shivering frightened"),
        _slot("flaw", "bad awful loud shrill sour dreadful rough weak flat horrible"),
        _slot(
            "glad",
            """happy glad proud cheerful pleased joyful delighted thankful excited thrilled merry grateful content
                amazed""",
        ),
        _slot(
            "virtue",
            """kindness patience courage honesty sharing teamwork friendship practice trust hope laughter love
                forgiveness listening helping wisdom imagination gratitude""",
        ),
        # Words of one plot each.
        _slot(
            "garment",
            """scarf coat shawl sweater jacket blanket apron cape towel mitten sock hat bonnet vest robe cardigan""",
        ),
        _slot(
            "forage",
            """acorns feathers mushrooms pinecones chestnuts violets blueberries strawberries walnuts daisies clovers
                herbs""",
        ),
        _slot("remedy", "milk tea broth water cocoa cider juice syrup lemonade medicine"),
        _slot(
            "flavor",
            """chocolate lemon vanilla strawberry banana pumpkin cinnamon ginger almond coconut raspberry caramel
                walnut apricot hazelnut peppermint""",
        ),
        _slot("cake", "cake pie tart muffin loaf waffle bun tartlet"),
        _slot("ingredient", "flour sugar eggs cream yeast salt oil vinegar rice vanilla oats lard"),
        _slot("container", "jar cupboard pantry tin drawer sack pot barrel box fridge bowl can"),
        _slot(
            "chore",
            """sweep the yard, feed the hens, wash the windows, carry the wood, mend the fence, polish the spoons,
                stack the bricks, peel the potatoes, shear the sheep, fold the laundry, scrub the floor, hang the
                curtains, rake the gravel, dust the books""",
        ),
        _slot(
            "instrument",
            """piano violin flute guitar harp cello banjo accordion tuba trombone clarinet harmonica fiddle bagpipe
                ukulele xylophone""",
        ),
        _slot("event", "fair parade festival wedding carnival concert picnic party banquet circus pageant contest"),
        _slot("prize", "medal cup trophy badge rosette sash star globe shield plate banner vase"),
        _slot(
            "flower",
            """rose tulip daisy sunflower lily poppy daffodil orchid pansy iris marigold lavender bluebell peony
                snowdrop dahlia""",
            noun,
        ),
        _slot("need", "water compost mulch ash clay rainwater moss straw peat loam"),
        _slot("chest", "chest trunk crate bag suitcase casket jug urn purse bottle"),
        _slot("gem", "pearls coins rubies emeralds diamonds crystals opals beads shells buttons fossils jewels"),
        _slot(
            "fear",
            """dark thunder wind lightning fog moonlight hail echo blizzard gale twilight rumbling howling rustling""",
        ),
        _slot("charm", "lamp candle pillow stone coin shell feather key torch cushion bead acorn"),
    )
}
