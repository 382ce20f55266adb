"""The stories, as rules: each maps templates to weights; `[rule]` expands a rule, `{slot.form}` mentions a slot.

How they are written, for whoever adds one:

- A slot is drawn where it is first mentioned. All templates of a rule settle the same facts, unless nothing later uses
  them.
- Templates of one rule must differ before they end, so that a text has one derivation; a test proves it.
- Facts come back far from where they were settled (more than five words), and only in the order that the plot dictates.
- Names never follow a quotation mark or a line break, so that a byte-level tokenizer sees each in one spelling.
"""

from __future__ import annotations

from transformerlm.corpus.grammar import Rules

RULES: Rules = {
    "story": {"[opening] [habit][plot]\n\n[ending]": 1},
    "plot": {
        "[lost]": 6,
        "[rescue]": 5,
        "[baking]": 5,
        "[music]": 4,
        "[garden]": 4,
        "[map]": 4,
        "[fear]": 4,
        "[friend]": 5,
    },
    # What every story shares.
    "opening": {
        "Once upon a time, {trait.a}, {look} {kind} named {hero} lived in {size.a} {home} near the {landmark} with"
        " {coat.a}, {temper} {species} called {pet}.": 4,
        "There once was {trait.a}, {look} {kind} called {hero} in {size.a} {home} near the {landmark}."
        " {hero.They} had {coat.a}, {temper} {species} named {pet}.": 3,
        "In {size.a} {home} near the {landmark} lived {trait.a}, {look} {kind} named {hero}. {hero.Their} best friend"
        " was {coat.a}, {temper} {species} called {pet}.": 2,
    },
    "habit": {
        "{hero.They} [loved] to {hobby} and to eat {treat}.": 3,
        "{hero.They} [loved] {treat} and always wanted to {hobby}.": 2,
        "When {hero.they} did not {hobby}, {hero.they} [loved] to eat {treat}.": 2,
    },
    "loved": {"loved": 4, "liked": 3, "adored": 1, "preferred": 1},
    "when": {"One {weather} {daytime} in {month},": 3, "On {weather.a} {weekday} in {month},": 3},
    "meet": {
        "[soon] they met {title} {surname}, the {mien} {job}.": 3,
        "[soon] {title} {surname}, the {mien} {job}, came by.": 2,
    },
    "ending": {
        "That night, {pet} slept [soundly]. [moral]": 3,
        "Then everybody went home to eat {treat}. [moral]": 3,
        "So {title} {surname} came to the {home} for some {treat}. [moral]": 2,
    },
    "moral": {
        "From then on, {hero} knew that {virtue} [matters].": 3,
        "And {hero} never forgot that {virtue} [matters].": 2,
        '"You see, {virtue} [matters]," [said] {hero}.': 2,
    },
    # Several ways to say the same: cheap variety, and nothing to remember.
    "soon": {
        "Soon": 4,
        "On the way": 3,
        "Just then": 2,
        "Suddenly": 2,
        "Near the gate": 1,
        "By chance": 1,
        "Around noon": 1,
    },
    "said": {"said": 6, "answered": 3, "replied": 3, "whispered": 2, "explained": 2, "added": 1},
    "asked": {"asked": 5, "wondered": 2, "called": 2, "sighed": 1, "cried": 1},
    "begged": {"begged": 4, "cried": 3, "sobbed": 2, "moaned": 1, "pleaded": 1},
    "very": {"very": 5, "so": 3, "quite": 2, "rather": 2, "really": 1, "terribly": 1, "a little": 1},
    "oh": {"Oh no!": 4, "Oh dear!": 3, "What a pity!": 2, "How strange!": 2, "Goodness me!": 1},
    "yes": {"Of course": 4, "Gladly": 2, "Certainly": 2, "With pleasure": 1, "Why not": 1, "All right": 1},
    "well": {"Well": 4, "You know": 3, "Listen": 2, "My dear": 2, "Look": 1},
    "hello": {"Hello!": 4, "Good morning!": 2, "Welcome!": 2, "How are you?": 2, "Nice to meet you!": 1},
    "wanted": {"wanted": 4, "hoped": 2, "wished": 2, "planned": 2, "decided": 2, "longed": 1},
    "found": {"found": 4, "discovered": 2, "noticed": 2, "spotted": 2, "saw": 2},
    "practiced": {"practiced": 4, "worked": 2, "played": 2, "rehearsed": 1},
    "soundly": {"well": 4, "soundly": 2, "deeply": 2, "peacefully": 2, "until noon": 1, "like a log": 1},
    "matters": {
        "matters": 4,
        "makes life better": 3,
        "is worth more than gold": 2,
        "wins in the end": 2,
        "comes first": 1,
    },
    # Something dear is lost, and found where a neighbor says.
    "lost": {" [lost.treasure]\n\n[when] [lost.outing] [lost.gone]\n\n[meet] [lost.hint] [lost.found]": 1},
    "lost.treasure": {
        "{hero.Their} {relative} had given {hero.them} {quality.a} {color} {toy}.": 3,
        "{hero.They} owned {quality.a} {color} {toy} from {hero.their} {relative}.": 2,
    },
    "lost.outing": {
        "{hero.they} {moved} to the {place} to play {game}.": 3,
        "they {moved} to the {place} for some {game}.": 2,
    },
    "lost.gone": {
        "But then the {toy} was gone, and {hero} felt [very] {sad}.": 3,
        '"[oh] Where is my {toy}?" [asked] {hero}, who was [very] {sad}.': 2,
    },
    "lost.hint": {
        '"Have you seen my {toy}?" [asked] {hero}. "[yes], look {spot}."': 3,
        '"Is something {quality} gone?" {title.they} [asked]. "I saw it {spot}."': 2,
    },
    "lost.found": {
        "There, {pet} [found] the {toy} from {hero.their} {relative}!": 3,
        "They {moved} back and [found] the {color} {toy}.": 2,
    },
    # A wild animal is hurt, is cared for, and comes back with a present.
    "rescue": {"\n\n[when] [rescue.find] [rescue.plea]\n\n[rescue.wrap] [meet] [rescue.heal] [rescue.thanks]": 1},
    "rescue.find": {
        "{hero.they} {moved} to the {place} and [found] {state.a} {creature} {spot}.": 3,
        "{pet} {moved} to the {place}. {state.A} {creature} was stuck {spot}.": 2,
    },
    "rescue.plea": {
        '"[oh] Please help me," [begged] the {creature}, who was [very] {sad}.': 3,
        '"I feel [very] {sad}," [begged] the {creature}.': 2,
    },
    "rescue.wrap": {
        "So {hero} wrapped the {creature} in {hero.their} {color} {garment}.": 3,
        "{hero} carried it home in {hero.their} {color} {garment}.": 2,
    },
    "rescue.heal": {
        '"It needs {remedy}," [said] {title} {surname}. After {number} cups, the {creature} was [very] {glad}.': 3,
        "{title.They} cooked {number} cups of {remedy}, which made the {creature} [very] {glad}.": 2,
    },
    "rescue.thanks": {
        "Later it brought them some {forage} from the {place}.": 3,
        "One day it came to the {home} with {forage}.": 2,
    },
    # A cake needs one more thing, and that costs a chore.
    "baking": {"\n\n[when] [baking.wish] [baking.missing]\n\n[meet] [baking.deal] [baking.done]": 1},
    "baking.wish": {
        "{hero} [wanted] to bake {quality.a} {flavor} {cake} for {hero.their} {relative}.": 3,
        "{hero.their} {relative} [wanted] to make {quality.a} {flavor} {cake}.": 2,
    },
    "baking.missing": {
        "But the {color} {container} held no {ingredient}, and {hero.they} felt [very] {sad}.": 3,
        '"[oh] The {color} {container} has no {ingredient}!" [said] {hero}, who was [very] {sad}.': 2,
    },
    "baking.deal": {
        '"[yes], you can have some, if you {chore}," {title.they} [said]. So they began to {chore}.': 3,
        '"We need {ingredient}," [said] {hero}. "Then {chore} with me," [said] {title} {surname}.': 2,
    },
    "baking.done": {
        "Soon the {container} was full, and {hero.their} {relative} was [very] {glad}.": 3,
        "Then the {quality} {cake} made {hero.their} {relative} [very] {glad}.": 2,
    },
    # An instrument is hard to play, until somebody helps to practice.
    "music": {"\n\n[music.dream] [music.fail]\n\n[music.teacher] [music.practice]\n\n[music.stage] [music.prize]": 1},
    "music.dream": {
        "On {weekday} there would be {event.a} at the {place}, and {hero} [wanted] to play the {instrument}.": 3,
        "Now {hero} [wanted] to play the {instrument} at the {event} near the {place} on {weekday}.": 2,
    },
    "music.fail": {
        "But it sounded [very] {flaw}. {hero.They} felt {sad}.": 3,
        "But {pet} found it [very] {flaw}. It made {hero.them} {sad}.": 2,
    },
    "music.teacher": {
        '"[yes], I can help you," [said] {title} {surname}, the {mien} {job}.': 3,
        "Next door lived {title} {surname}, the {mien} {job}, who had {instrument.a} too.": 2,
    },
    "music.practice": {
        "They [practiced] for {number} weeks while {pet} slept.": 3,
        "For {number} weeks, {hero} [practiced] at the {home}.": 2,
    },
    "music.stage": {
        "When {weekday} came, everybody at the {event} was [very] {glad}.": 3,
        "At the {place}, nothing was {flaw} anymore, and everybody was [very] {glad}.": 2,
    },
    "music.prize": {
        "{hero.They} won {quality.a} {color} {prize} and showed it to {title} {surname}.": 3,
        "The prize was {quality.a} {color} {prize}, which {hero.they} gave to {hero.their} {relative}.": 2,
    },
    # Seeds do not grow until they get what they need.
    "garden": {"\n\n[when] [garden.plant] [garden.wait]\n\n[meet] [garden.advice] [garden.care] [garden.bloom]": 1},
    "garden.plant": {
        "{hero} planted {number} {flower} seeds in {quality.a} {color} {container}.": 3,
        "{hero} [found] {number} {flower} seeds and put them into {quality.a} {color} {container}.": 2,
    },
    "garden.wait": {
        "But nothing grew in the {container}, and {hero.they} felt [very] {sad}.": 3,
        '"[oh] Where is my {flower}?" [asked] {hero}, who was [very] {sad}.': 2,
    },
    "garden.advice": {
        '"[well], every {flower} needs {need}," [said] {title} {surname}.': 3,
        '"Your {container} has no {need}," {title.they} [said].': 2,
    },
    "garden.care": {
        "So they {moved} to the {place} and got some.": 3,
        "So {hero} brought some from the {place} by {vehicle}.": 2,
    },
    "garden.bloom": {
        "Soon {number} {flower.plural} stood in the {quality} {container}, and {hero.their} {relative} was [very]"
        " {glad}.": 3,
        "Later {hero} had {number} {flower.plural} and gave one to {title} {surname}, who was [very] {glad}.": 2,
    },
    # An old map leads to a treasure, which is shared.
    "map": {"\n\n[when] [map.find] [map.travel]\n\n[meet] [map.riddle] [map.dig] [map.share]": 1},
    "map.find": {
        "{pet} dug up {quality.a} {color} {container} with a map of the {place}.": 3,
        "{hero} opened {quality.a} {color} {container} and [found] a map of the {place}.": 2,
    },
    "map.travel": {
        "They packed {garment.a} and some {forage} and went there by {vehicle}.": 3,
        "So {hero.they} took {garment.a}, {pet} took {forage}, and they left by {vehicle}.": 2,
    },
    "map.riddle": {
        '"Dig {spot}," [said] {title} {surname}.': 3,
        '"[well], the treasure is {spot}," {title.they} [said].': 2,
    },
    "map.dig": {
        "They dug for {number} hours and [found] {chest.a} full of {gem}!": 3,
        "There they [found] {chest.a} with {number} {gem} in it.": 2,
    },
    "map.share": {
        "So {hero} filled the {container} with {gem} and was [very] {glad}.": 3,
        "They took the {chest} home by {vehicle}, and {hero.their} {relative} was [very] {glad}.": 2,
    },
    # Somebody is afraid, and learns that others are too.
    "fear": {" [fear.afraid]\n\n[when] [fear.hide]\n\n[meet] [fear.story] [fear.charm]\n\n[fear.end]": 1},
    "fear.afraid": {
        "But {hero.they} feared the {fear}.": 3,
        "But {hero.they} was [very] afraid of the {fear}.": 2,
    },
    "fear.hide": {
        "{hero} was [very] {sad} and hid under {quality.a} {color} {garment}.": 3,
        "it came, and {hero}, who was [very] {sad}, [wanted] to hide under {quality.a} {color} {garment}.": 2,
    },
    "fear.story": {
        '"I feared the {fear} until I was {number}," {title.they} [said].': 3,
        '"Are you {number} years old and fear the {fear}?" [asked] {title} {surname}.': 2,
    },
    "fear.charm": {
        '"Here is my {charm} from {country}."': 3,
        '"Take this {charm}. I got it in {country} from {state.a} {creature}."': 2,
    },
    "fear.end": {
        "When the {fear} came again, {hero} held the {charm} and was [very] {glad}.": 3,
        "After {weeks} weeks, {hero} gave the {charm} to {hero.their} {relative} and was [very] {glad}.": 2,
    },
    # A new child comes from far away and has nobody to play with.
    "friend": {"\n\n[when] [friend.arrive] [friend.shy]\n\n[friend.talk] [friend.play]\n\n[meet] [friend.share]": 1},
    "friend.arrive": {
        "{manner.a} {friendkind} named {friend} came from {country} by {vehicle}.": 3,
        "{hero} met {manner.a} {friendkind} called {friend}, who came from {country}.": 2,
    },
    "friend.shy": {
        "{friend.They} sat at the {place} with {quality.a} {color} {toy} and looked [very] {sad}.": 3,
        "But {friend.they} was [very] {sad} and only had {quality.a} {color} {toy}.": 2,
    },
    "friend.talk": {
        '"[hello] Do they play {game} in {country}?" [asked] {hero}.': 3,
        '"Can I see the {toy} and play {game} with you?" [asked] {hero}.': 2,
    },
    "friend.play": {
        '"[yes], I love {game}," [said] {friend} and was [very] {glad}.': 3,
        '{friend} put down the {toy}. "[yes]," {friend.they} [said].': 2,
    },
    "friend.share": {
        "{title.They} gave {pet} and {friend} some {forage} and {flavor.a} {cake}.": 3,
        '"Come and help me {chore}," {title.they} [said], so {hero} put the {toy} away.': 2,
    },
}
