"""The invented world that the quickstart's backbone is pretrained on: seven domains, their slots and their wordings.

The lists are long on purpose. With few values, a small model guesses them from their frequency. With about twenty or
more, the easiest way to lower the loss is to copy the value from the context. A prefix later steers that ability.

Alternatives inside a string are separated by ``/``. ``{}`` stands for the slot's value, ``@`` for the entity's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NAME = ("<name>",)
LANDMARK = ("<landmark>",)
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Slot:
    """An attribute: its labels in records, its values, and its wordings as predicate, noun complement and question."""

    labels: tuple[str, ...]
    values: tuple[str, ...]
    predicates: tuple[str, ...]
    complements: tuple[str, ...]
    questions: tuple[str, ...]
    no_predicates: tuple[str, ...] = ()
    no_complements: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """A kind of entity. ``nouns`` name the kind; ``pronouns`` refer back to an entity of the kind."""

    nouns: tuple[str, ...]
    pronouns: tuple[str, ...]
    slots: dict[str, Slot] = field(default_factory=dict)


def _slot(
    labels: str,
    values: str | tuple[str, ...],
    predicates: str,
    complements: str,
    questions: str,
    no_predicates: str = "",
    no_complements: str = "",
) -> Slot:
    split = tuple(values.split("/")) if isinstance(values, str) else values
    wordings = (predicates, complements, questions, no_predicates, no_complements)
    texts = [tuple(text.split("/")) if text else () for text in wordings]
    return Slot(tuple(labels.split("/")), split, *texts)


FOODS = (
    "Italian/French/Greek/Indian/Thai/Chinese/Japanese/Korean/Mexican/Spanish/Turkish/Polish/Russian/German/Danish/"
    "Swedish/Irish/Scottish/Welsh/Dutch/Cuban/Persian/Syrian/Peruvian/Moroccan/Egyptian"
)
PRICES = "cheap/expensive/moderate/modest/costly/low-cost/mid-priced/pricey/affordable/fair"
AREAS = (
    "city centre/old town/harbour/riverside/north side/south side/west end/east end/market square/castle quarter/"
    "garden district/upper town/lower town/new town/suburbs/valley"
)
NUMBERS = "/".join(str(number) for number in range(2, 60))
COLOURS = (
    "black/white/grey/red/blue/green/yellow/brown/orange/purple/pink/silver/golden/cream/ginger/dark blue/pale green/"
    "light grey/dark red/bright yellow"
)

DOMAINS: dict[str, Domain] = {
    "restaurant": Domain(
        ("restaurant", "place to eat", "dining room"),
        ("it", "the restaurant", "this place"),
        {
            "food": _slot(
                "food/cuisine/kitchen",
                FOODS,
                "serves {} food/offers {} dishes/is known for {} cooking/has a {} kitchen",
                "with {} food/serving {} dishes/with a {} kitchen",
                "What food does @ serve/What kind of dishes are there at @",
            ),
            "price": _slot(
                "price/prices/cost",
                PRICES,
                "is {}/has {} prices/is a {} choice",
                "with {} prices/at a {} price",
                "What are the prices at @/How are the prices of @",
            ),
            "area": _slot(
                "area/district/part of town",
                AREAS,
                "is in the {}/can be found in the {}/lies in the {}/stands in the {}",
                "in the {}/from the {}",
                "In which area is @/What part of town is @ in",
            ),
            "near": _slot(
                "near/close to/landmark",
                LANDMARK,
                "is near {}/is close to {}/lies beside {}/stands across from {}",
                "near {}/close to {}/beside {}",
                "What is @ near/Which landmark is close to @",
            ),
            "rating": _slot(
                "rating/score/mark",
                "1/2/3/4/5",
                "has a rating of {}/is rated {}/got {} points out of 5/scores {} out of 5",
                "with a rating of {}/with {} points/rated {} out of 5",
                "How is @ rated/What is the rating of @",
            ),
            "family": _slot(
                "family/families/family friendly",
                YES_NO,
                "welcomes families/is family friendly/is a good place for a family",
                "for families/with room for families",
                "Is @ family friendly/Are families welcome at @",
                "does not welcome families/is not family friendly/is no place for a family",
                "not for families/without room for families",
            ),
        },
    ),
    "hotel": Domain(
        ("hotel", "inn", "guest house"),
        ("it", "the hotel", "this house"),
        {
            "rooms": _slot(
                "rooms/number of rooms",
                NUMBERS,
                "has {} rooms/offers {} rooms/counts {} rooms",
                "with {} rooms/of {} rooms",
                "How many rooms does @ have/How many rooms are there at @",
            ),
            "price": _slot(
                "price/rate/cost",
                PRICES,
                "is {}/asks a {} price/is a {} place to stay",
                "with {} rates/at a {} price",
                "What does @ cost/How are the rates of @",
            ),
            "area": _slot(
                "area/quarter/location",
                AREAS,
                "is in the {}/is located in the {}/welcomes guests in the {}",
                "in the {}/of the {}",
                "Where is @/In which quarter is @",
            ),
            "near": _slot(
                "near/neighbour/next to",
                LANDMARK,
                "is next to {}/is near {}/has {} next door",
                "next to {}/near {}/by {}",
                "What is next to @/What is @ close to",
            ),
            "stars": _slot(
                "stars/rating/class",
                "1/2/3/4/5",
                "has {} stars/is rated {} by guests/was given {} out of 5",
                "with {} stars/rated {} by its guests",
                "How many stars does @ have/How did guests rate @",
            ),
            "pets": _slot(
                "pets/animals",
                YES_NO,
                "allows pets/is happy to take animals/is good for guests with dogs",
                "for guests with pets/with pets allowed",
                "Are pets allowed at @/Does @ take animals",
                "does not allow pets/takes no animals/is not good for guests with dogs",
                "without pets/with no animals allowed",
            ),
        },
    ),
    "shop": Domain(
        ("shop", "store", "market stall"),
        ("it", "the shop", "this store"),
        {
            "goods": _slot(
                "goods/sells/stock",
                "books/shoes/hats/lamps/toys/flowers/bread/cheese/tea/coffee/wine/fruit/paint/tools/clocks/rings/maps/"
                "chairs/carpets/candles/soap/gloves/kites/bicycles/spices/honey",
                "sells {}/has a good choice of {}/is the place to buy {}",
                "with {}/selling {}/for people who want {}",
                "What does @ sell/What can you buy at @",
            ),
            "price": _slot(
                "price/prices/level",
                PRICES,
                "is {}/has {} goods/sells at {} prices",
                "with {} prices/at {} prices",
                "How are the prices at @/Is @ cheap",
            ),
            "area": _slot(
                "area/place/location",
                AREAS,
                "is in the {}/opened in the {}/waits for you in the {}",
                "in the {}/at the {}",
                "Where can you find @/Where is @",
            ),
            "near": _slot(
                "near/beside/close to",
                LANDMARK,
                "is beside {}/is a short walk from {}/can be found next to {}",
                "beside {}/near {}/a short walk from {}",
                "What is @ beside/What stands next to @",
            ),
            "opens": _slot(
                "opens/opening hour",
                "5/6/7/8/9/10/11/12",
                "opens at {}/is open from {}/lets you in at {}",
                "open from {}/opening at {}",
                "When does @ open/At what hour can you go to @",
            ),
            "parking": _slot(
                "parking/cars",
                YES_NO,
                "has parking/has room for cars/lets you park at the door",
                "with parking/with room for cars",
                "Is there parking at @/Can you park at @",
                "has no parking/has no room for cars/does not let you park",
                "without parking/with no room for cars",
            ),
        },
    ),
    "museum": Domain(
        ("museum", "gallery", "collection"),
        ("it", "the museum", "this house"),
        {
            "subject": _slot(
                "subject/shows/theme",
                "ships/trains/coins/stamps/dolls/glass/maps/stars/birds/fish/stones/bones/masks/swords/paintings/photographs/"
                "machines/music/clocks/silk/gold/planes/bridges/letters/insects/costumes",
                "shows {}/is about {}/is full of {}",
                "about {}/of {}/for lovers of {}",
                "What does @ show/What is @ about",
            ),
            "fee": _slot(
                "fee/ticket/entry",
                NUMBERS,
                "costs {} coins/asks {} coins at the door/has tickets for {} coins",
                "for {} coins/with tickets at {} coins",
                "What is the fee at @/How many coins does @ ask",
            ),
            "area": _slot(
                "area/part of town/district",
                AREAS,
                "is in the {}/was built in the {}/belongs to the {}",
                "in the {}/of the {}",
                "In what district is @/Where was @ built",
            ),
            "near": _slot(
                "near/opposite/close to",
                LANDMARK,
                "is opposite {}/is near {}/faces {}",
                "opposite {}/near {}",
                "What is @ opposite/What does @ face",
            ),
            "children": _slot(
                "children/kids",
                YES_NO,
                "is fun for children/has a corner for children/welcomes kids",
                "for children too/with a corner for kids",
                "Is @ for children/Can children go to @",
                "is not for children/has nothing for children/does not welcome kids",
                "not for children/with nothing for kids",
            ),
        },
    ),
    "musician": Domain(
        ("musician", "player", "artist"),
        ("she", "he", "the musician"),
        {
            "instrument": _slot(
                "instrument/plays",
                "piano/violin/cello/harp/flute/oboe/clarinet/trumpet/trombone/tuba/guitar/banjo/drums/organ/lute/viola/"
                "accordion/saxophone/mandolin/zither/bagpipes/horn/double bass/recorder",
                "plays the {}/is a master of the {}/never travels without the {}",
                "on the {}/with the {}",
                "What does @ play/Which instrument does @ play",
            ),
            "style": _slot(
                "style/music/genre",
                "jazz/blues/folk/rock/pop/soul/swing/tango/samba/opera/chamber/church/dance/film/country/gospel/punk/ska/"
                "baroque/reggae",
                "loves {} music/is famous for {} music/prefers {} tunes",
                "of {} music/known for {} tunes",
                "What music does @ love/In which style does @ play",
            ),
            "town": _slot(
                "town/home/lives in",
                NAME,
                "lives in {}/comes from {}/has a house in {}",
                "from {}/living in {}",
                "Where does @ live/Which town is @ from",
            ),
            "years": _slot(
                "years/on stage",
                NUMBERS,
                "has played for {} years/has been on stage for {} years/started {} years ago",
                "with {} years on stage/after {} years of playing",
                "How many years has @ played/How long has @ been on stage",
            ),
            "teaches": _slot(
                "teaches/lessons",
                YES_NO,
                "gives lessons/teaches children/takes pupils",
                "with pupils/who gives lessons",
                "Does @ give lessons/Does @ take pupils",
                "gives no lessons/does not teach/takes no pupils",
                "without pupils/who gives no lessons",
            ),
        },
    ),
    "cat": Domain(
        ("cat", "pet", "house cat"),
        ("she", "he", "the cat"),
        {
            "colour": _slot(
                "colour/fur/coat",
                COLOURS,
                "is {}/has {} fur/wears a {} coat",
                "with {} fur/in a {} coat",
                "What colour is @/What fur does @ have",
            ),
            "age": _slot(
                "age/years",
                NUMBERS,
                "is {} months old/has lived for {} months",
                "of {} months/{} months old",
                "How old is @/How many months old is @",
            ),
            "character": _slot(
                "character/nature/temper",
                "shy/bold/lazy/playful/proud/gentle/wild/calm/curious/greedy/noisy/quiet/clever/silly/brave/sleepy/friendly/"
                "grumpy/careful/patient",
                "is very {}/has a {} nature/is often {}",
                "with a {} nature/of a {} kind",
                "What is @ like/What nature does @ have",
            ),
            "meal": _slot(
                "meal/food/eats",
                "tuna/chicken/salmon/beef/cheese/milk/shrimp/rabbit/duck/egg/liver/turkey/cod/lamb/herring/rice",
                "eats {}/asks for {}/wants {} for all meals",
                "fed on {}/fond of {}",
                "What does @ eat/What meals does @ want",
            ),
            "owner": _slot(
                "owner/family/lives with",
                NAME,
                "lives with {}/belongs to {}/sleeps next to {}",
                "of {}/living with {}",
                "Who does @ live with/Who is the owner of @",
            ),
        },
    ),
    "boat": Domain(
        ("boat", "ship", "vessel"),
        ("it", "she", "the boat"),
        {
            "kind": _slot(
                "kind/type/class",
                "ferry/yacht/tug/barge/canoe/trawler/schooner/cutter/sloop/galley/raft/liner/dinghy/lifeboat/steamer/"
                "houseboat/tanker/pilot boat",
                "is a {}/was built as a {}/sails as a {}",
                "of the {} type/built as a {}",
                "What kind of boat is @/What type is @",
            ),
            "colour": _slot(
                "colour/paint/hull",
                COLOURS,
                "is {}/is painted {}/has a {} hull",
                "with a {} hull/in {} paint",
                "What colour is @/How is @ painted",
            ),
            "length": _slot(
                "length/metres",
                NUMBERS,
                "is {} metres long/measures {} metres",
                "of {} metres/{} metres long",
                "How long is @/How many metres does @ measure",
            ),
            "port": _slot(
                "port/home port/harbour",
                NAME,
                "sails from {}/goes to {} each week/is at home in {}",
                "from {}/bound for {}",
                "What is the port of @/Where does @ sail from",
            ),
            "cargo": _slot(
                "cargo/load/carries",
                "coal/grain/salt/sand/wood/wool/oil/sugar/fish/iron/bricks/cars/horses/letters/potatoes/cotton/apples/"
                "bananas/cement/barrels/guests/sheep",
                "carries {}/is loaded with {}/brings {} to the islands",
                "with a load of {}/for carrying {}",
                "What does @ carry/What is the cargo of @",
            ),
        },
    ),
}
