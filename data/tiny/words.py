"""The word tables and sentence patterns that ``corpus.py`` puts documents together from.

All of them were written for this repository.  A table has rows split by ``|`` (or one per line) and fields split by
``;``.  The pattern language is explained in ``corpus.py``.  There is no code here, on purpose.
"""

from __future__ import annotations

# ---------------------------------------------------------------------------------------------------------------------
# Word tables
# ---------------------------------------------------------------------------------------------------------------------

GIRLS = """Anna Bella Clara Daisy Ella Fiona Grace Hanna Iris Julia Kate Lily Mia Nora Olive Polly Rosa Sara Tilda Vera
Wendy Zoe Amy Beth Cora Dora Emma Freya Greta Holly Ida Jane Lucy Molly Nina Ruby Sophie Tess""".split()
BOYS = """Adam Ben Carl David Eric Felix George Henry Ivan Jack Kim Leo Max Noah Oscar Peter Quinn Robin Sam Tom Victor
Will Alex Billy Colin Danny Edgar Frank Hugo Jacob Luke Martin Nick Oliver Paul Ravi Simon Theo""".split()
PET_SHE = """Pippa Hazel Willow Misty Coco Luna Poppy Nutmeg Clover Maple Pearl Ginger Dotty Fern Honey Snowy Tulip
Bonnie
Sunny Bramble""".split()
PET_HE = """Pip Rusty Bruno Toby Biscuit Acorn Pepper Scout Flint Bobbin Chester Duke Monty Basil Rocky Barney Otto
Pebble
Ziggy Bertie""".split()
STORY_ANIMALS = """fox bear rabbit mouse squirrel hedgehog owl frog duck goat sheep pony cat dog turtle badger mole
otter
beaver deer goose crow donkey pig lamb wolf robin sparrow penguin monkey elephant""".split()
HERO_ADJ = "little small young tiny cheerful brave clever shy gentle quiet lively kind curious friendly".split()
TRAITS = """kind brave clever patient curious gentle cheerful helpful careful friendly polite playful honest thoughtful
hopeful calm""".split()
COLOURS = "red blue green yellow white brown orange purple pink grey golden silver".split()
MATERIALS = "wooden metal paper glass plastic woollen cotton leather stone clay".split()
ANIMAL_HOMES = """in a warm den under an oak tree|in a cosy burrow near the stream|in a hollow log in the forest|beside
a quiet pond|at the edge of a green meadow|in a little house between two hills|on a small farm by the river|under the
roots of a tall pine tree|in an old barn near the village|by the shore of a blue lake|in a nest of leaves and soft
grass"""
CHILD_HOMES = """in a small house near the river|in a tall house in the middle of the town|on a farm with many animals|
in a cottage at the edge of the forest|in a village by the sea|in a flat above a bakery|in a house with a blue door|at
the
top of a green hill|in a quiet street near the park|in a white house beside the lake|next door to a flower shop"""
ANIMAL_AREAS = """the forest|the meadow|the green valley|the wide field|the old wood|the hills|the garden|the orchard"""
CHILD_AREAS = "the village|the town|the park|the market square|the quiet street|the garden|the field|the woods"
SEASON_ADJ = {
    "spring": "bright fresh mild sunny soft lovely".split(),
    "summer": "hot warm sunny bright fine lovely".split(),
    "autumn": "windy cool misty grey foggy quiet".split(),
    "winter": "cold snowy frosty icy clear chilly".split(),
}
SEASON_WEATHER = {
    "spring": """The birds were singing in the trees.|New flowers were opening everywhere.|The air was fresh and the
grass
 was green.|Small white clouds moved across the sky.|The rain had stopped, and the leaves were shining.""",
    "summer": """The sun was shining and the sky was blue.|It was so warm that the bees were humming.|The grass was
dry and
 the air smelled of flowers.|There was not a cloud in the sky.|A soft, warm wind was blowing.""",
    "autumn": """Red and yellow leaves were falling from the trees.|The wind was blowing through the branches.|The air
was
 cool and smelled of apples.|A thin mist lay over the fields.|Brown leaves danced along the path.""",
    "winter": """Snow covered the roofs and the trees.|The pond was covered with ice.|The air was cold and very still.|
White
 snowflakes were falling slowly.|Everything outside was white and quiet.""",
}
ELDERS_CHILD = """Grandmother Rose;she|Grandfather Tom;he|old Mr. Reed;he|old Mrs. Hill;she|Aunt May;she|Uncle Joe;he|
old Mr. Brook;he|old Mrs. Wood;she|Grandmother Ivy;she|Grandfather Bill;he"""
ELDERS_ANIMAL = """the old owl;he|the old tortoise;she|the old badger;he|the wise old crow;she|the grey goose;she|the
old
horse;he|the old toad;he|the wise old owl;she"""
FOODS = """apple;apples|pear;pears|plum;plums|carrot;carrots|potato;potatoes|tomato;tomatoes|onion;onions|egg;eggs|
banana;bananas|orange;oranges|lemon;lemons|bun;buns|cake;cakes|pie;pies|biscuit;biscuits|pancake;pancakes|
cherry;cherries|
strawberry;strawberries|mushroom;mushrooms|nut;nuts|bean;beans|cucumber;cucumbers|peach;peaches|grape;grapes"""
TREATS = """apples pears plums buns cakes pies biscuits pancakes cherries strawberries nuts peaches grapes oranges
bananas
berries""".split()
MATERIAL_OF = {
    "scarf": "wool|cotton",
    "hat": "wool|straw|cotton",
    "mitten": "wool",
    "kite": "paper|cotton",
    "book": "paper",
    "ball": "leather|wool",
    "basket": "straw|wood",
    "cup": "clay|metal|glass",
    "button": "wood|metal|glass",
}
GOODS = """bread|milk|cheese|butter|rice|flour|sugar|salt|honey|jam|tea|soup|fish|oil|pasta|a bag of nuts|a box of eggs|
a jar of honey|a loaf of bread|a bottle of milk|a bag of flour|a pot of jam|a piece of cheese|two lemons|three onions|
six eggs|some apples|some carrots|some potatoes|some tomatoes|a new broom|a ball of wool|a packet of seeds|a candle|
a cake of soap|four pears|five plums|a bunch of grapes|a bag of oats|some mushrooms"""
PACK = """a warm jumper|a raincoat|a hat|a pair of boots|two shirts|a toothbrush|a towel|a book|a torch|a map|
a water bottle|some sandwiches|a blanket|a pillow|a tent|an umbrella|sunglasses|a swimsuit|a pair of gloves|a scarf|
clean socks|a comb|a rope|a compass|a camera|an apple|a notebook|a pencil|a sleeping bag|a small pot|matches|a first
aid kit"""
TRIPS = """a trip to the sea|a night in the forest|a visit to Grandmother|a walk in the hills|a week at the lake|
a day in the snow|a picnic in the park|a train journey|a camping trip|a sailing trip|a school trip|a long bike ride"""

CATEGORIES: dict[str, str] = {
    "fruits": "apple|pear|plum|banana|cherry|peach|lemon|orange|grape|strawberry|melon|apricot",
    "vegetables": "carrot|potato|onion|cabbage|pea|bean|leek|turnip|cucumber|spinach|radish|beetroot",
    "colours": "red|blue|green|yellow|white|black|brown|orange|purple|pink|grey",
    "farm animals": "cow|pig|sheep|goat|horse|hen|duck|goose|donkey",
    "wild animals": "fox|bear|wolf|deer|badger|hedgehog|lion|tiger|elephant|monkey|zebra|giraffe",
    "birds": "robin|owl|sparrow|eagle|duck|goose|swan|crow|parrot|penguin|hen",
    "insects": "bee|ant|fly|beetle|butterfly|moth|wasp|grasshopper|ladybird",
    "pets": "cat|dog|rabbit|hamster|goldfish|parrot|guinea pig",
    "tools": "hammer|saw|screwdriver|spade|rake|axe|drill|ruler|brush|ladder|spanner",
    "clothes": "shirt|coat|hat|scarf|sock|glove|dress|skirt|jumper|belt|jacket",
    "pieces of furniture": "table|chair|bed|sofa|desk|shelf|cupboard|wardrobe|stool|bench",
    "drinks": "water|milk|tea|coffee|lemonade|apple juice|orange juice|cocoa",
    "shapes": "circle|square|triangle|rectangle|oval|star|pentagon|hexagon",
    "musical instruments": "piano|violin|drum|flute|guitar|trumpet|harp|cello|whistle",
    "parts of the body": "head|arm|leg|hand|foot|nose|ear|eye|mouth|knee|shoulder|elbow",
    "kinds of weather": "rain|snow|wind|sunshine|fog|hail|frost|storm",
    "ways to travel": "train|bus|car|boat|plane|bicycle|tram|ship|ferry",
    "flowers": "rose|tulip|daisy|lily|sunflower|daffodil|poppy|violet|snowdrop",
    "trees": "oak|pine|birch|beech|willow|maple|elm|fir|chestnut",
    "toys": "ball|doll|kite|puzzle|teddy bear|toy train|spinning top|yo-yo",
    "jobs": "teacher|baker|farmer|doctor|nurse|gardener|builder|painter|driver|cook|pilot|singer",
    "rooms in a house": "kitchen|bedroom|bathroom|living room|hall|attic|cellar",
    "things in a kitchen": "pan|pot|spoon|fork|knife|plate|bowl|cup|oven|kettle",
    "school things": "pencil|pen|book|ruler|rubber|notebook|bag|map|globe",
}
MASS = set(
    """spinach water milk tea coffee lemonade cocoa rain snow wind sunshine fog hail frost red blue green yellow
white black brown purple pink grey""".split()
) | {"apple juice", "orange juice"}

ANIMAL_HEAD = "name plural group eats lives sound legs young look"
ANIMALS = """cat;cats;mammal;meat and fish;in houses;meow;four;kitten;soft fur and long whiskers
dog;dogs;mammal;meat and bones;in houses;bark;four;puppy;a wet nose and a wagging tail
cow;cows;mammal;grass and hay;on farms;moo;four;calf;a big body and two horns
horse;horses;mammal;grass and oats;in stables and fields;neigh;four;foal;a long mane and strong legs
sheep;sheep;mammal;grass;in green fields;bleat;four;lamb;thick, curly wool
goat;goats;mammal;grass and leaves;on farms and mountains;bleat;four;kid;two horns and a short beard
pig;pigs;mammal;roots, fruit and grain;on farms;grunt;four;piglet;a round nose and a curly tail
hen;hens;bird;grain and worms;on farms;cluck;two;chick;feathers and a red comb
duck;ducks;bird;water plants and snails;on ponds;quack;two;duckling;a flat beak and wide feet
goose;geese;bird;grass and grain;near lakes;honk;two;gosling;a long neck and white feathers
swan;swans;bird;water plants;on lakes and rivers;hiss;two;cygnet;a long, curved neck and white wings
owl;owls;bird;mice;in woods and old barns;hoot;two;owlet;big round eyes
eagle;eagles;bird;fish and small animals;on high mountains;scream;two;eaglet;sharp claws and wide wings
robin;robins;bird;worms and insects;in gardens;sing;two;chick;a bright red breast
penguin;penguins;bird;fish;on cold, icy coasts;squawk;two;chick;black and white feathers
parrot;parrots;bird;seeds and fruit;in warm forests;squawk;two;chick;bright feathers and a strong beak
crow;crows;bird;seeds, worms and insects;in fields and woods;caw;two;chick;shiny black feathers
fox;foxes;mammal;mice, birds and berries;in dens in the woods;bark;four;cub;red fur and a bushy tail
bear;bears;mammal;fish, berries and honey;in forests;growl;four;cub;thick fur and big paws
wolf;wolves;mammal;deer and other animals;in forests;howl;four;cub;grey fur and sharp teeth
lion;lions;mammal;meat;on hot, grassy plains;roar;four;cub;golden fur and a long tail
tiger;tigers;mammal;meat;in warm forests;roar;four;cub;orange fur with black stripes
elephant;elephants;mammal;grass, leaves and bark;in warm countries;trumpet;four;calf;a long trunk and large ears
giraffe;giraffes;mammal;leaves from tall trees;on warm, dry plains;hum;four;calf;a very long neck
zebra;zebras;mammal;grass;on warm, grassy plains;bark;four;foal;black and white stripes
monkey;monkeys;mammal;fruit, nuts and leaves;in warm forests;chatter;four;infant;long arms and clever hands
rabbit;rabbits;mammal;grass and carrots;in burrows;squeak;four;kitten;long ears and a short, fluffy tail
mouse;mice;mammal;seeds and grain;in small holes;squeak;four;pup;small ears and a long, thin tail
squirrel;squirrels;mammal;nuts and seeds;in trees;chatter;four;kitten;a big, fluffy tail
hedgehog;hedgehogs;mammal;worms and beetles;in hedges and gardens;snuffle;four;hoglet;hundreds of sharp spines
deer;deer;mammal;grass, leaves and buds;in forests;bellow;four;fawn;thin legs and brown fur
kangaroo;kangaroos;mammal;grass;in Australia;grunt;four;joey;strong back legs and a pouch
camel;camels;mammal;dry plants and grass;in hot deserts;groan;four;calf;one or two humps on its back
whale;whales;mammal;fish and tiny sea animals;in the sea;sing;no;calf;a huge body and a wide tail
dolphin;dolphins;mammal;fish and squid;in the sea;whistle;no;calf;smooth grey skin and a curved fin
seal;seals;mammal;fish;on cold coasts;bark;no;pup;smooth fur and flat flippers
frog;frogs;amphibian;flies and worms;in ponds;croak;four;tadpole;wet green skin and long back legs
snake;snakes;reptile;mice and frogs;in grass, sand and forests;hiss;no;snakelet;dry scales and a long, thin body
tortoise;tortoises;reptile;leaves and grass;in warm, dry places;hiss;four;hatchling;a hard, round shell
bee;bees;insect;nectar from flowers;in hives;buzz;six;larva;yellow and black stripes
ant;ants;insect;seeds, leaves and sweet food;in nests under the ground;-;six;larva;a tiny body and thin legs
butterfly;butterflies;insect;nectar from flowers;in gardens and meadows;-;six;caterpillar;four wide, bright wings
spider;spiders;arachnid;flies and other insects;in webs;-;eight;spiderling;eight thin legs and a round body
shark;sharks;fish;fish and seals;in the sea;-;no;pup;sharp teeth and a pointed fin
bat;bats;mammal;moths and other insects;in caves and old roofs;squeak;two;pup;wings of thin skin
otter;otters;mammal;fish;beside rivers;whistle;four;pup;thick brown fur and a strong tail"""
SIZE_ORDER = "ant bee mouse frog hedgehog rabbit cat fox sheep lion horse giraffe elephant whale".split()
SPEED_ORDER = ["a snail", "a person on foot", "a bicycle", "a bus", "a fast train", "a plane"]
WEIGHT_ORDER = ["a feather", "a pencil", "an apple", "a brick", "a chair", "a piano", "a car", "a ship"]

CAPITALS = """France;Paris|Italy;Rome|Spain;Madrid|Germany;Berlin|Portugal;Lisbon|Greece;Athens|Norway;Oslo|
Sweden;Stockholm|Finland;Helsinki|Denmark;Copenhagen|Poland;Warsaw|Austria;Vienna|Hungary;Budapest|Ireland;Dublin|
England;London|Scotland;Edinburgh|Wales;Cardiff|Belgium;Brussels|Russia;Moscow|Egypt;Cairo|Kenya;Nairobi|Japan;Tokyo|
China;Beijing|India;New Delhi|Canada;Ottawa|Brazil;Brasilia|Peru;Lima|Cuba;Havana|Australia;Canberra|Turkey;Ankara|
Iceland;Reykjavik|Mexico;Mexico City|Chile;Santiago|Thailand;Bangkok"""
COLOUR_OF = """the sky on a clear day;blue|grass;green|snow;white|coal;black|milk;white|a banana;yellow|a lemon;yellow|
a ripe tomato;red|a strawberry;red|blood;red|an orange;orange|a carrot;orange|chocolate;brown|a cucumber;green|
a fire engine;red|a daffodil;yellow|a sunflower;yellow|a pea;green|the night sky;black|a flamingo;pink|a swan;white|
a raven;black|an elephant;grey|a frog;green|a pumpkin;orange|salt;white|a rain cloud;grey|an egg yolk;yellow|
gold;yellow|
a blueberry;blue|spinach;green|a polar bear;white|a ripe cherry;red|rice;white|a mole;black"""
OPPOSITES = """hot;cold|big;small|tall;short|fast;slow|happy;sad|old;young|day;night|up;down|in;out|open;closed|
full;empty|
hard;soft|heavy;light|wet;dry|clean;dirty|early;late|near;far|rich;poor|strong;weak|high;low|loud;quiet|left;right|
black;white|good;bad|easy;difficult|long;brief|thick;thin|wide;narrow|brave;afraid|first;last|begin;end|push;pull|
win;lose|buy;sell|come;go|give;take|laugh;cry|love;hate|above;below|inside;outside|sweet;sour|sharp;blunt|deep;shallow|
rough;smooth|true;false|always;never|sunrise;sunset|north;south|east;west|summer;winter|remember;forget|top;bottom|
before;after|question;answer|lost;found|polite;rude|safe;dangerous|tight;loose|front;back|float;sink"""
TOOLS = """a hammer;hit nails|a saw;cut wood|a spade;dig holes|a rake;gather leaves|a broom;sweep the floor|
a knife;cut bread|a spoon;eat soup|a pen;write|a brush;paint a wall|a needle;sew clothes|a key;open a lock|
a ladder;reach high places|a clock;tell the time|a kettle;boil water|an oven;bake bread|a ruler;draw straight lines|
a thermometer;measure how warm it is|an umbrella;stay dry in the rain|a torch;see in the dark|a net;catch fish|
a bucket;carry water|a map;find the way|scissors;cut paper|glue;stick things together|soap;wash our hands|
a comb;tidy our hair|a fridge;keep food cold|a bell;call people|a telescope;look at the stars|a drill;make holes in
walls|
a screwdriver;turn screws|an axe;chop wood|a towel;dry our hands|a watering can;water plants|a candle;give light|
a pillow;rest our heads|a calendar;see what day it is|a compass;find north|a scale;weigh things|an iron;make clothes
smooth"""
JOBS = """teacher;teaches children|baker;bakes bread|farmer;grows food and looks after animals|doctor;helps sick people|
nurse;takes care of sick people|builder;builds houses|gardener;looks after plants|painter;paints walls and pictures|
cook;makes meals|pilot;flies planes|driver;drives cars and buses|singer;sings songs|dentist;looks after teeth|
vet;helps sick animals|tailor;makes clothes|postman;brings letters|firefighter;puts out fires|fisherman;catches fish|
librarian;looks after books|carpenter;makes things from wood|sailor;works on a ship|shepherd;looks after sheep|
miner;digs for coal and metal|waiter;brings food to tables|writer;writes books|potter;makes pots from clay|
plumber;mends water pipes|mechanic;repairs cars|beekeeper;looks after bees|barber;cuts hair|judge;decides in a court|
shopkeeper;sells things in a shop"""
BODY = """eyes;see|ears;hear|nose;smell|tongue;taste|legs;walk|hands;hold things|teeth;chew food|lungs;breathe|
brain;think|heart;pump blood|skin;feel|fingers;touch small things|feet;stand"""
KEPT = """milk;in the fridge|books;on a shelf|clothes;in a wardrobe|shoes;by the door|plates;in a cupboard|money;in a
purse|
flowers;in a vase|letters;in a drawer|bread;in a bread bin|cars;in a garage|tools;in a shed|hay;in a barn|fish;in a
tank|
pencils;in a pencil case|ice cream;in the freezer|towels;in the bathroom|toys;in a toy box|apples;in a basket|
umbrellas;in the hall|tea;in a tin"""
MADE = """a window;glass|a tyre;rubber|a jumper;wool|a book;paper|a nail;metal|a plank;wood|a brick;clay|a candle;wax|
bread;flour and water|butter;milk|cheese;milk|jam;fruit and sugar|paper;wood|a snowman;snow|a raincoat;plastic|
a shoe;leather|a T-shirt;cotton|a coin;metal|a mirror;glass|wine;grapes|honey;nectar|an omelette;eggs|a bottle;glass|
a castle wall;stone|a mug;clay|a web;silk|lemonade;lemons, water and sugar"""
FROM = """milk;cows|eggs;hens|honey;bees|wool;sheep|apples;trees|grapes;vines|flour;grain|wood;trees|light;the sun|
rain;clouds|chips;potatoes|raisins;dried grapes|silk;silkworms"""
SHAPES = """triangle;three|square;four|rectangle;four|pentagon;five|hexagon;six|octagon;eight"""
COUNTS = """days are there in a week;seven;There are seven days in a week
months are there in a year;twelve;There are twelve months in a year
seasons are there in a year;four;There are four seasons in a year
hours are there in a day;twenty-four;There are twenty-four hours in a day
minutes are there in an hour;sixty;There are sixty minutes in an hour
seconds are there in a minute;sixty;There are sixty seconds in a minute
fingers are there on one hand;five;There are five fingers on one hand
wheels does a bicycle have;two;A bicycle has two wheels
wheels does a car have;four;A car has four wheels
wheels does a tricycle have;three;A tricycle has three wheels
eyes does a person have;two;A person has two eyes
letters are there in the alphabet;twenty-six;There are twenty-six letters in the alphabet
legs does a spider have;eight;A spider has eight legs
legs does an insect have;six;An insect has six legs
eggs are there in a dozen;twelve;There are twelve eggs in a dozen
colours are there in a rainbow;seven;There are seven colours in a rainbow
days are there in a leap year;366;There are 366 days in a leap year
years are there in a century;one hundred;There are one hundred years in a century
centimetres are there in a metre;one hundred;There are one hundred centimetres in a metre
arms does an octopus have;eight;An octopus has eight arms"""
SCIENCE = """What happens to ice when it gets warm?;Ice melts and becomes water when it gets warm.
What happens to water when it gets very cold?;Water freezes and becomes ice when it gets very cold.
What happens to water when it boils?;Water turns into steam when it boils.
What do plants need to grow?;Plants need light, water and air to grow.
What gives us light in the day?;The sun gives us light in the day.
What can we see in the sky at night?;We can see the moon and the stars in the sky at night.
Why do we have day and night?;We have day and night because the Earth turns around.
What does the Earth move around?;The Earth moves around the sun.
What does the moon move around?;The moon moves around the Earth.
How long does the Earth take to go around the sun?;The Earth takes one year to go around the sun.
Why does a stone sink in water?;A stone sinks because it is heavier than water.
Why does wood float on water?;Wood floats because it is lighter than water.
What does a magnet pull?;A magnet pulls things made of iron.
What does a fire need to burn?;A fire needs air, heat and fuel to burn.
Where does rain come from?;Rain comes from clouds.
What is snow?;Snow is frozen water that falls from clouds.
When can we see a rainbow?;We can see a rainbow when the sun shines through rain.
What makes a shadow?;Something that stops the light makes a shadow.
What do roots do?;Roots hold a plant in the ground and take in water.
What do seeds become?;Seeds grow into new plants.
Why do birds have feathers?;Feathers keep birds warm and help them fly.
Why do we wear coats in winter?;We wear coats in winter because it is cold.
Why do bears sleep in winter?;Bears sleep in winter because there is little food.
Why do we sleep?;We sleep because our bodies need to rest.
Why do we eat food?;We eat food because it gives us energy.
Why do we wash our hands?;We wash our hands to keep them clean and to stay healthy.
Why does a sailing boat move?;A sailing boat moves because the wind pushes its sails.
What is the sun?;The sun is a star that is very hot and bright.
What is wind?;Wind is moving air.
What is fog?;Fog is a cloud that lies close to the ground.
What is a desert?;A desert is a very dry place with little rain.
What is an island?;An island is land with water all around it.
What is a mountain?;A mountain is a very high piece of land.
What is a river?;A river is a long stream of water that flows to the sea.
What is a forest?;A forest is a large place with many trees.
What is a village?;A village is a small place where people live.
What is the sea?;The sea is a very large area of salt water.
Where do fish live?;Fish live in water.
How do fish breathe?;Fish breathe with gills.
What do caterpillars become?;Caterpillars become butterflies or moths.
What do tadpoles become?;Tadpoles become frogs.
Where does the sun rise?;The sun rises in the east.
Where does the sun set?;The sun sets in the west.
Is sea water salty?;Yes, sea water is salty.
What does sound travel through?;Sound travels through air, water and walls.
What happens to leaves in autumn?;In autumn, many leaves turn red, yellow or brown and fall.
What happens to a puddle on a sunny day?;A puddle dries up on a sunny day because the water goes into the air.
What comes after lightning?;Thunder comes after lightning.
What does a green traffic light mean?;A green traffic light means that you may go.
What does a red traffic light mean?;A red traffic light means that you must stop."""
TRAVEL = """a train;on rails|a boat;on water|a plane;in the air|a car;on roads|a bus;on roads|a ship;on the sea|
a tram;on rails in a city|a sledge;on snow|a submarine;under water|a balloon;in the air|a bicycle;on roads and paths|
a canoe;on lakes and rivers|a helicopter;in the air|a tractor;on farms"""
SEASON_FACTS = """spring;flowers begin to bloom|spring;birds build their nests|spring;lambs are born|spring;the days
get longer|
summer;it is warm and the days are long|summer;many people swim in the sea|summer;strawberries are ripe|
autumn;leaves fall from the trees|autumn;farmers pick apples|autumn;the days get shorter|autumn;squirrels gather nuts|
winter;snow falls and ponds freeze|winter;the nights are long|winter;children build snowmen|winter;many trees have no
leaves"""
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November December""".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty""".split()
PLURALS = """mouse;mice|foot;feet|tooth;teeth|child;children|man;men|woman;women|goose;geese|sheep;sheep|fish;fish|
leaf;leaves|
knife;knives|wolf;wolves|loaf;loaves|shelf;shelves|baby;babies|city;cities|story;stories|berry;berries|puppy;puppies|
box;boxes|fox;foxes|bus;buses|dish;dishes|brush;brushes|church;churches|potato;potatoes|tomato;tomatoes|cat;cats|
dog;dogs|
book;books|tree;trees|house;houses|boy;boys|day;days|key;keys|toy;toys|bird;birds|apple;apples|person;people|ox;oxen|
half;halves|glass;glasses|watch;watches|lady;ladies|deer;deer|hero;heroes|wife;wives|peach;peaches|fly;flies|
calf;calves"""
PAST = """go;went|see;saw|eat;ate|run;ran|sing;sang|swim;swam|write;wrote|read;read|take;took|give;gave|make;made|
find;found|
come;came|fly;flew|drink;drank|sleep;slept|buy;bought|bring;brought|think;thought|teach;taught|catch;caught|know;knew|
grow;grew|throw;threw|draw;drew|drive;drove|ride;rode|speak;spoke|break;broke|wake;woke|begin;began|ring;rang|sit;sat|
stand;stood|hear;heard|hold;held|keep;kept|feel;felt|leave;left|lose;lost|meet;met|pay;paid|say;said|sell;sold|
send;sent|
tell;told|win;won|build;built|fall;fell|forget;forgot|hide;hid|dig;dug|walk;walked|jump;jumped|play;played|help;helped|
look;looked|carry;carried|try;tried|stop;stopped|cook;cooked|laugh;laughed|dance;danced|open;opened|cry;cried"""
COMPARATIVES = """big;bigger;biggest|small;smaller;smallest|tall;taller;tallest|fast;faster;fastest|old;older;oldest|
good;better;best|bad;worse;worst|happy;happier;happiest|hot;hotter;hottest|cold;colder;coldest|easy;easier;easiest|
long;longer;longest|strong;stronger;strongest|near;nearer;nearest|heavy;heavier;heaviest|kind;kinder;kindest|
clean;cleaner;cleanest|early;earlier;earliest|thin;thinner;thinnest|bright;brighter;brightest"""
RHYMES = """cat;hat|dog;frog|tree;bee|house;mouse|cake;lake|rain;train|moon;spoon|star;car|boat;goat|fish;dish|
bear;chair|
sun;fun|night;light|ring;king|bed;red|box;fox|day;play|snow;go|hill;mill|book;cook|door;floor|sheep;sleep|ball;wall|
hen;pen"""

STEPS = """make a cup of tea;Boil some water.;Put a tea bag into a cup.;Pour the hot water into the cup.;Wait for three
 minutes.;Take out the tea bag.;Add milk if you like.
plant a seed;Fill a pot with soil.;Make a small hole in the soil.;Put the seed into the hole.;Cover the seed with
 soil.;Water
 it gently.;Put the pot in a sunny place.
wash your hands;Turn on the tap.;Wet your hands.;Rub them with soap.;Rinse off the soap.;Turn off the tap.;Dry your
 hands with a
 towel.
make a sandwich;Take two slices of bread.;Spread butter on the bread.;Add cheese or jam.;Put the slices together.;Cut
 the
 sandwich in half.;Put it on a plate.
brush your teeth;Wet your toothbrush.;Put some toothpaste on it.;Brush all your teeth for two minutes.;Rinse your
 mouth with
 water.;Clean the brush.
cross the road;Stop at the edge of the road.;Look left and right.;Listen for cars.;Wait until the road is clear.;Walk
 straight
 across.
make a snowman;Roll a big ball of snow.;Roll a smaller ball and put it on top.;Add a small ball for the head.;Use a
 carrot for
 the nose.;Use stones for the eyes.;Put a hat on its head.
bake a cake;Heat the oven.;Mix butter and sugar in a bowl.;Add eggs and flour.;Pour the mixture into a tin.;Bake it
 for forty
 minutes.;Let the cake cool.
send a letter;Write the letter.;Put it into an envelope.;Write the address on the front.;Stick a stamp on it.;Take it
 to the
 post box.
build a bird house;Cut some wood into pieces.;Nail the sides together.;Make a round hole in the front.;Put the roof on
 top.;Paint
 it green.;Hang it in a tree.
make vegetable soup;Wash the vegetables.;Cut them into small pieces.;Put them into a pot of water.;Cook them for half an
 hour.;Add a little salt.;Serve the soup hot.
boil an egg;Fill a small pot with water.;Bring the water to the boil.;Put the egg in carefully.;Wait for six
 minutes.;Take the
 egg out with a spoon.;Cool it in cold water.
make lemonade;Cut three lemons in half.;Squeeze out the juice.;Add sugar and stir.;Pour in cold water.;Add some ice.
make a paper boat;Take a sheet of paper.;Fold it in half.;Fold the corners to the middle.;Fold up the edges.;Pull the
 sides
 apart gently.
clean your room;Pick up the toys.;Put the books on the shelf.;Make the bed.;Dust the desk.;Sweep the floor.
get ready for school;Get out of bed.;Wash your face.;Put on your clothes.;Eat your breakfast.;Brush your teeth.;Pack
 your bag.
wash a dog;Fill a tub with warm water.;Put the dog in the tub.;Wet its fur.;Rub in some dog soap.;Rinse it well.;Dry
 it with a
 towel.
light a room without power;Find a safe place for a candle.;Put the candle in a holder.;Ask an adult to light it.;Keep
 it away
 from the curtains.;Blow it out before you sleep."""

# ---------------------------------------------------------------------------------------------------------------------
# Story patterns
# ---------------------------------------------------------------------------------------------------------------------

OPENINGS = """Once upon a time, there was a~{adj} {k} named {n}. {He} lived {home}.|Once upon a time, a~{adj} {k}
named {n}
lived {home}.|{n} was a~{adj} {k} who lived {home}.|There once was a~{adj} {k} called {n}, who lived {home}.|Long ago,
a~{adj}
{k} named {n} lived {home}.|Not far from here, {home}, lived a~{adj} {k} named {n}.|This is the story of {n}, a~{adj}
{k} who
lived {home}.|{n} the {k} lived {home}.|There was once a~{k} named {n}. {n} was {adj}, and {he} lived {home}.|Do you
know
{n}? {n} is a~{adj} {k} who lives {home}.|In {area}, there lived a~{adj} {k} named {n}.|Everyone in {area} knew {n},
the {adj}
{k}."""
QUICK_OPENINGS = """{time}, {n} the {k} woke up early.|{time}, a~{adj} {k} named {n} [looked out of the window/stepped
outside/sat by the door/was walking through {area}].|It was a~{sadj} {season} {part}. {n}, a~{adj} {k}, [was at home/was
outside/had nothing to do/wanted to do something new].|{time}, {n} woke up and [stretched/smiled/yawned]. {n} was
a~{adj} {k}.|
"What a~{sadj} {part}!" said {n}, a~{adj} {k} who lived {home}."""
ABOUT_HERO = """{n} was [very/always/both] {trait} and {trait2}.|Everyone liked {n} because {he} was [so/always]
{trait}.|{n}
loved [to sing/to play outside/to hear stories/to look at the stars/to climb trees/to walk in {area}/to eat {food}].|
{His}
best friend was {o}, a~{ok}.|{n} had [bright eyes/a warm smile/a soft voice/a kind heart] and [many friends/a big
dream/a
{trait} nature].|Every day, {he} [played in {area}/walked through {area}/helped at home/learned something new]."""
CLOSINGS = """That night, {n} [slept well/fell asleep with a smile/dreamed sweet dreams].|{n} [went home happy/was very
happy/smiled all the way home].|From that day on, {n} and {o} were [the best of friends/always together/even better
friends].|
It was a~[day/{season} {part}] that {n} would never forget.|And they all lived happily in {area}.|When the moon came
up, {n}
told {e} the whole story.|{n} and {o} [laughed/sang/danced] all the way home.|"What a~[wonderful/lovely/good] day!"
said {n}."""

PLOTS_TEXT = """
# lost
thing = ball, scarf, kite, key, hat, lantern, ring, book, drum, bell, basket, mitten, button, whistle, cup
lesson = It is good to ask for help.|A good friend helps you look.|Never give up too soon.|Two friends find more than
  one.
- {T} {n} could not find {his} {col} {thing}. It was made of {mat}, and {he} loved it [very much/more than any other
  thing].
| {T} {n} lost {his} {col} {thing}. It was a gift from {e}.
| {T} {n} saw that {his} {col} {thing} was gone. {He} had [played with it/carried it] only the day before.
- {He} looked [under the bed/behind the door/in every corner], but the {thing} was not there.
| "Where is my {thing}?" {he} asked. {He} looked [everywhere/high and low/up and down].
| {n} searched [the whole house/every room] and [then the garden/then the path outside], but {he} found nothing.
? {n} felt [very sad/so sad that {he} began to cry/worried and sad].
| A tear ran down {his} face.
+ Then {o} the {ok} came by. "What is wrong, {n}?" asked {o}.
| {o}, a friendly {ok}, saw that {n} was sad and asked what was wrong.
| Soon {he} met {o} the {ok}. "Why are you sad?" asked {o}.
- "I have lost my {col} {thing}," said {n}. "[Do not worry/Do not be sad]," said {o}. "[I will help you/We will find
  it together]."
| {n} told {o} about the {col} {thing}. "Let us look for it together," said {o}.
- They walked [to the river/along the path/through {area}] and looked [behind every tree/under every bush/under every
  stone].
| First they looked [by the gate/near the well/in the tall grass]. Then they looked [under the bridge/behind the old
  wall].
- At last, {o} saw something {col} [in the grass/under a bush/behind a stone/between the leaves]. It was the {thing}!
| Suddenly {n} saw a~[small/bright] {col} spot [near a fence/under a tree/by the water]. "My {thing}!" {he} cried.
- "Thank you, {o}!" said {n}, and [held the {thing} tight/smiled a big smile/jumped for joy].
| {n} was so happy that {he} [gave {o} a hug/danced around the tree]. "You are a true friend," {he} said.
? After that, {n} always kept the {col} {thing} in a safe place.
| From then on, {n} took good care of {his} {thing}.
# friend
thing = ball, kite, swing, drum, puzzle, boat, book, cart, whistle, doll
lesson = A smile is a good way to begin.|It only takes one kind word to make a friend.|Being kind brings new friends.
- {T} {n} had [no one/nobody] to play with. {He} felt [lonely/a little sad/very alone].
| {n} had a~{col} {thing}, but no friend to share it with. {T} {he} felt very lonely.
| {T} {n} sat alone [under a tree/by the path/on a stone] and wished for a friend.
- Then {he} saw a~{ok} [by the fence/near the pond/on the hill/next to the path]. The {ok} was new in {area}.
| A new {ok} had come to {area}. {n} saw {ohim} [by the water/under a tree/near the gate].
? {n} was [shy/a little afraid] and did not know what to say.
| At first, {n} [hid behind a tree/only watched/did not dare to speak].
- But {n} took a deep breath and said, "[Hello/Hi/Good day]! My name is {n}. What is your name?"
| "[Hello/Good morning/Hi]," said {n} [in a small voice/with a smile]. "I am {n}. Who are you?"
- "I am {o}," said the {ok}. "I do not know anyone here."
| "My name is {o}," said the {ok} [shyly/softly]. "I would like to have a friend."
+ "Do you want to play with my {col} {thing}?" asked {n}. {o} [nodded/smiled/said yes] at once.
| {n} showed {o} the {col} {thing}. "[How lovely/How nice]!" said {o}. "May I try it?"
- They played [all day/until the sun went down/for hours] and [laughed a lot/told each other stories/shared some
  {food}].
| They [ran/played] through {area}, and then they rested [under a tree/in the grass] and ate {food}.
- "Will you come back tomorrow?" asked {o}. "[Of course/Yes, I will]," said {n}. "We are friends now."
| When it was time to go home, {o} said, "Thank you for playing with me." {n} said, "See you tomorrow!"
- Now {n} was not lonely any more.
| After that day, {n} and {o} met [every day/each morning/after breakfast every day].
# storm
thing = boat, cart, fence, hut, shed, raft
lesson = Friends keep each other safe.|Every storm ends.|After the rain, the sun comes back.
- {T} {n} and {o} the {ok} were [playing/walking/picking flowers] in {area}.
| {T} {n} went out to {area} with {o}, a~{ok}.
- Suddenly, the sky grew dark, and the wind began to [blow/howl].
| Then big black clouds came over the hill, and [it began to rain/thunder rolled across the sky].
| But soon the wind grew strong, and cold rain fell on {his} [nose/head].
- "A storm is coming!" [cried/shouted/said] {o}. "We must find a safe place!"
| "We must hurry!" said {n}. "The storm will be here soon."
? There was a flash of lightning, and both of them [jumped/were frightened].
| The thunder was so loud that {n} [covered {his} ears/shook with fear].
+ They ran to an old {matadj} {thing} and [hid beside it/sat down close to it], but the rain came in from all sides.
| They [saw/found] a~{col} {thing}, but the wind was so strong that it [shook/broke in two].
- Then {n} remembered a~[dry cave/small cave/warm barn] [near the stream/behind the hill/between the rocks]. They ran
  there as fast as they could.
| "Follow me!" said {n}. {He} took {o} to a~[warm barn/dry cave] [not far away/close to the path].
- Inside, it was dry and [warm/quiet]. They sat close together and [told stories/sang a song/counted the thunder]
  until the rain stopped.
| They held each other tight and [sang softly/told funny stories] until the storm was over.
- When they came out, there was a~[big/bright/beautiful] rainbow in the sky.
| At last, the sun came out again, and every leaf was shining.
- The {thing} was broken, but {n} and {o} were safe. The next day, they [mended the {thing}/repaired it] together.
| {E} was glad to see them. "[I was so worried/Thank goodness you are safe]," said {e}.
# share
thing = basket, bag, bowl, plate, box, pot, jar
lesson = Sharing makes food taste better.|When you share, everyone is happy.|A little is enough when you share it.
- {T} {n} had a~{col} {thing} full of {food}. They [looked/smelled] [very good/wonderful/sweet and fresh].
| {T} {n} packed many {food} into a~{col} {thing} and went out.
| {T} {e} gave {n} a~{col} {thing} full of {food}.
- "I will eat them all by myself," thought {n}, and {he} sat down [under a tree/on a bench/by the stream].
| {He} sat down [in the shade/on a stone/in the grass] to eat, for {he} was very hungry.
- Just then, {o} the {ok} came by. {o} looked [tired/thin/tired and hungry].
| Then {he} saw {o}, a~{ok} who had [nothing/not had anything] to eat that day.
- "I am so hungry," said {o}. "I have had no breakfast."
| "Those {food} look good," said {o} quietly.
? {n} looked at the {food} and thought for a~[while/moment].
| {n} did not want to share at first. But {he} remembered how it feels to be hungry.
+ "Come and sit with me," said {n}. "[There is enough for two/You can have half of my {food}]."
| {n} smiled and gave half of the {food} to {o}. "[Please eat/These are for you]," said {n}.
- {o}'s face [lit up/grew bright]. "Thank you! You are very kind," {ohe} said.
| {o} ate [slowly/happily] and said, "These are the best {food} I have ever had."
- They ate together and talked about [the {season}/{area}/their dreams/many things].
| Soon the {thing} was empty, but both of them were full and happy.
- A few days later, {n} had nothing to eat. {o} came with a~[big pie/warm loaf of bread/pot of soup] and shared it
  with {him}.
| The next week, {o} came to {n}'s door with some fresh {food2}. "Now I can share with you," said {o}.
# build
thing = boat, tree house, bridge, kite, bench, bird house, hut, cart, raft, sledge, table, swing
lesson = Work is easy when friends help.|Step by step, big things are made.|Good work takes time.
- {T} {n} had an idea. "I will build a~{thing}!" {he} said.
| {T} {n} wanted to build a~{thing}. {He} had dreamed of one [for a long time/all {season}].
- {He} found some [old wood/long sticks/strong planks], [a hammer/a rope/some rope] and a box of nails.
| First, {he} [made a plan/drew a picture of it]. Then {he} went to look for wood and nails.
- {He} worked [all morning/for hours], but the {thing} [fell apart/broke/fell over].
| But it was hard work. Each time {he} tried, the {thing} [fell apart/broke].
? "I will never finish it," said {n} [sadly/with a sigh].
| {n} sat down on the ground and [sighed/shook {his} head].
+ {o} the {ok} was watching. "You need someone to hold the wood," said {o}. "[Let me help/I can help you]."
| Then {o}, a~{ok}, came along. "May I help you?" asked {o}. "[I am good with a hammer/Two can do more than one]."
- So {o} held the wood, and {n} [used the hammer/put in the nails]. They [worked/laughed and worked] until
  [noon/evening].
| Together they [measured/cut] the wood and put all the pieces together [with care/one by one].
- When the {thing} was ready, they painted it {col}.
| "Let us paint it {col}," said {o}. Soon the {thing} was [bright/shining] and {col}.
- "[It is beautiful/It looks wonderful/We did it]!" said {n}. "[I could not have done it alone/Thank you, {o}]."
| {E} came to see it. "What a fine {thing}!" said {e}.
? They used the {col} {thing} every day that {season}.
| Everyone in {area} came to look at the {col} {thing}.
# learn
thing = swim, whistle, ride a bicycle, bake bread, read, skate, dance, sew, draw, climb, sing, juggle, paint, row a boat
lesson = If you practise, you will learn.|Nobody learns everything in one day.|Making mistakes is a part of learning.
- {T} {n} wanted to learn to {thing}. All the others in {area} could do it, but {he} could not.
| {T} {n} saw {o} the {ok} [laughing in the sun/having fun]. {o} knew how to {thing}. "I want to learn to {thing}
  too," said {n}.
- {He} tried once, and it [went wrong/did not go well]. {He} tried again, and it was [no better/even worse].
| At first, it was [very hard/not easy at all]. {n} [made many mistakes/got everything wrong].
- "I cannot do it," [said {n}/sighed {n}/{n} said sadly].
| "It is too hard for me," said {n}, and {he} wanted to give up.
+ {E} heard this and said, "[Nobody can do it on the first day/Everyone has to start somewhere]. Try a little every
  day."
| "I can teach you to {thing}," said {e}. "[You only need time/Just watch me and try again]."
- So {n} practised [every morning/every day/day after day]. {E} [helped/watched] and said, "Good! Once more."
| Every day after breakfast, {n} practised with {e}. Slowly, it became easier.
? Sometimes {he} was tired, but {he} did not stop.
| Some days were good and some days were bad, but {he} kept trying.
- After [one week/two weeks/ten days/a month], {n} could {thing} [very well/all alone/without any help].
| Then, one day, {n} could {thing}! {He} could hardly believe it.
- "Look, I can {thing}!" {he} [shouted/called/cried] with joy.
| {E} [clapped/smiled] and said, "I knew you could do it."
? Now {n} teaches {o} and {his} other friends to {thing}.
| Now {n} likes to {thing} every day.
# neighbour
thing = fence, gate, shed, door, porch, hut, bench, barn, stable
lesson = Helping others makes you happy too.|A small kindness can mean a lot.|Good neighbours help each other.
- {T} {n} saw that {e} [looked sad/looked tired/was working very hard]. The old {thing} was in a bad way.
| {E} lived next to {n}. {T} {n} saw that {e} could not [take care of/look after] the {thing} alone.
- "My back hurts," said {e}, "and I am too old to do all this work."
| "I am not as strong as I used to be," said {e}. "I wish I had some help."
- {n} thought about it. {He} wanted to [help/do something kind].
| "I can help you," said {n} at once.
+ So {he} asked {o} the {ok} to come, and they brought [two brooms and a bucket/some tools/a ladder and some paint].
| {He} ran to {o}, a~{ok}. "[Come with me/We have some work to do]," said {n}. "{E} needs our help."
- They [cleaned/washed] the {thing}, took away the [old leaves/dry leaves] and painted the wood {col}.
| First they cleaned everything. Then they [mended/repaired] what was broken and painted it {col}.
? It was hard work, but they sang [a happy song/merry songs] and did not stop.
| {n} was [hot/tired] and dirty, but {he} did not mind.
- When {e} came out, {ehe} could not believe {ehis} eyes. "[How beautiful/How kind of you]!" {ehe} said.
| "It looks like new!" said {e}. {Ehe} had tears of joy in {ehis} eyes.
- {Ehe} gave them [fresh/sweet] {food} and told them [a story/stories] about the old days.
| To say thank you, {ehe} made some {food} for {n} and {o}.
? After that, {n} visited {e} every [week/Sunday/Saturday].
# race
thing = race, boat race, running race, sack race, spoon race
lesson = Being kind is better than winning.|Slow and steady is often best.|Doing your best is what counts.
- {T} there was a big {thing} in {area}. The prize was a~{col} {prize}.
| {T} everyone in {area} came to see the {thing}. The winner would get a~{col} {prize}.
prize = cup, ribbon, hat, flag, medal, scarf, bell
- {n} wanted to win [very much/more than anything]. But {o} the {ok} was [very fast/the fastest of all].
| {n} had practised for weeks. {o}, a~{ok}, laughed and said, "[I am faster than you/You can never win]."
- "One, two, three, go!" called {e}, and they were off.
| {E} [rang a bell/waved a flag], and the {thing} began.
- At first, {o} was far ahead. {n} was [only second/behind], but {he} did not give up.
| {o} was soon in front, and {n} [came after/followed] as fast as {he} could.
+ Then {o} [fell/tripped over a stone/hurt {ohis} foot] and cried out in pain.
| But near the end, {o} looked back, [tripped/slipped] and fell.
- {n} could have won now. But {he} stopped and [asked/said], "Are you hurt? Let me help you."
| {n} stopped at once and helped {o} to get up. "Lean on me," said {n}.
- Together they [came to/crossed] the finish line. Everyone [clapped/cheered].
| They walked to the end side by side, and [all the people/everybody] cheered.
- "{n} and {o} are both winners," said {e}, and gave {n} the {col} {prize}.
| {E} gave the {col} {prize} to {n}. "This is for your kind heart," said {e}.
? "I am sorry that I [laughed/was so proud]," said {o}. "[Thank you for helping me/You are a good friend]."
# birthday
thing = cake, drum, kite, hat, book, ball, boat, scarf, puzzle, whistle, lantern, music box, teddy bear
lesson = The best gift is a friend.|Gifts from the heart are the best.|It is good to be remembered.
- {T} {n} was excited. It was {his} birthday!
| {T} it was {n}'s birthday. {He} was [six/seven/eight/nine] years old, and {he} jumped out of bed.
- But nobody said "Happy birthday". {E} was busy, and {o} the {ok} was not at home.
| {He} went to see {o}, a~{ok}, but {o} said, "I am sorry, I have no time today."
- "Has everyone forgotten me?" {n} [thought/wondered], and {he} felt [sad/very sad].
| {n} walked through {area} alone. "Nobody remembers my birthday," {he} said.
+ In the evening, {e} called, "{n}, please come [here/to the garden/home]!"
| When {he} came home, the house was [dark/quiet]. {n} opened the door [slowly/carefully].
- "Surprise!" [cried/shouted] all {his} friends. There were [candles/lights] and [flowers/balloons] everywhere.
| All at once, the lights went on, and everyone [sang a song/shouted, "Happy birthday"].
- {o} gave {him} a~{col} {thing}. "I made it for you," said {o}.
| There was a~[big/little] box on the table. Inside was a~{col} {thing} from {o}.
- "[Thank you/Oh, thank you]!" said {n}. "This is the best {thing} in the world."
| {n} looked at the {col} {thing} and could not stop smiling.
? They ate {food}, played games and danced until late.
| There were {food} for everyone, and they sang until the stars came out.
# repair
thing = clock, chair, cup, toy, lamp, kite, cart, umbrella, bell, doll, drum, bowl, music box
lesson = It is brave to tell the truth.|Broken things can often be mended.|Being honest is always best.
- {T} {n} was playing in the house of {e}. {He} ran too fast and knocked over a~{col} {thing}.
| {T} {n} borrowed the {col} {thing} of {e}. But it slipped and fell to the ground.
- Crash! The {thing} was broken.
| It fell with a loud noise and broke into [two/three/four] pieces.
- {n} was [afraid/frightened/worried]. "What shall I do?" {he} [thought/asked {self}].
| "Oh no!" said {n}. "{E} will be [angry/so sad]."
? {He} wanted to hide the pieces [under the bed/in a box/behind the door].
| First {he} thought of running away.
+ Then {o} the {ok} came in. "You should tell the truth," said {o}. "[I will go with you/It is the right thing to do]."
| {He} told {o}, a~{ok}. "[Be brave/Do not hide it]," said {o}. "Tell {e} what happened."
- So {n} went to {e} and said, "I broke your {col} {thing}. I am [very sorry/so sorry]."
| {n} took the pieces to {e}. "I am sorry," {he} said. "I broke it."
- {E} was quiet for a moment. Then {ehe} smiled. "Thank you for telling me. [We can repair it/Let us mend it together]."
| "I am glad that you told me," said {e}. "Now let us repair it."
- They took [glue/some glue and a brush/some tools] and worked until the {thing} was whole again.
| {E} held the pieces, and {n} put on the glue. [Soon/After an hour] the {thing} looked almost like new.
? "It is even better than before," said {e}, "because we mended it together."
# secret
thing = cave, garden, pond, tower, tunnel, waterfall, hut, grove, well
lesson = Some places are best when shared.|There is always something new to find.|Keep your eyes open and you will see
  wonders.
- {T} {n} was following a~[butterfly/blue bird/small stream] through {area}. {He} came to a place {he} had never seen
  before.
| {T} {n} was walking in {area} when {he} saw [a narrow path/some strange footprints/a hole in the hedge].
- Behind [some bushes/a wall of leaves/two tall trees], {he} found a secret {thing}.
| {He} pushed the leaves away, and there was an old {thing} that nobody knew.
- It was [quiet/cool/dark] there, and {col} flowers grew [everywhere/all around/between the stones].
| Everything was quiet. There were {col} flowers and [soft moss/tall ferns] all around.
? {n}'s heart beat fast. "[Is anybody here/Hello]?" {he} called, but there was no answer.
| "How beautiful it is here!" {n} [whispered/said softly].
+ {n} wanted to tell someone. So {he} ran to {o} the {ok} and said, "Come with me. I will show you something."
| The next day, {n} took {o}, a~{ok}, to see it. "You must not tell anyone," said {n}.
- When {o} saw the {thing}, {ohis} eyes grew [big/round/wide]. "It is like a dream," said {o}.
| "[What a wonderful place/This is amazing]!" said {o}. "Who made it?"
- They found a~{matadj} box with [an old map/a silver coin/a letter/a small bell] inside.
| On a stone, they found [a letter/an old key/a silver coin] in a little {matadj} box.
- They [put it back/left it there] and promised to keep the secret.
| "This will be our secret place," said {n}. They [cleaned it/swept the ground] and made two seats of
  [wood/stone/grass].
? Every [week/Saturday], they met at the secret {thing} and [told stories/ate {food}/made plans].
# dark
thing = lamp, lantern, candle, torch, night light
lesson = The dark is not so bad when you look closely.|Being brave does not mean having no fear.|Even a small light
  helps.
- {n} had one problem. {He} was afraid of the dark.
| When the sun went down, {n} [felt afraid/began to shake]. {He} did not like the dark.
- One {season} night, {n} was in bed when {he} heard a~[strange noise/soft sound]. {O1}
| Every night, {he} pulled the blanket over {his} head. One {season} night, {he} heard a noise. {O1}
- "Who is there?" {he} [whispered/asked]. Nobody answered.
| {n} saw a~[big/long/black] shadow on the wall. "Is it a monster?" {he} thought.
- {He} ran to {e}. "There is something in the dark!" {he} said.
| "Help!" {he} cried, and {e} came at once.
+ {E} took a~{col} {thing} and said, "[Come, let us look together/Let us see what it is]."
| "Take this {col} {thing}," said {e}. "With a little light, you can see what is there."
- They [looked/went] outside. It was only {o} the {ok}, who [could not sleep/was looking at the stars]!
| In the light of the {thing}, {n} saw that it was only a~[branch/coat/tree] moving in the wind.
- Then they looked up. The sky was full of stars, and the moon was [round/bright/silver].
| "Look at the stars," said {e}. "We can only see them when it is dark."
- "The dark is beautiful," said {n}. {He} was not [afraid/scared] any more.
| {n} put the {col} {thing} beside {his} bed and [closed {his} eyes/went to sleep] without fear.
# garden
season = spring
thing = sunflower, pumpkin, rose, tomato plant, apple tree, tulip, strawberry plant, cherry tree, bean plant, melon
lesson = Good things take time.|Care makes things grow.|Be patient, and you will see wonders.
- {T} {e} gave {n} a~[small/tiny/brown] seed. "This will be a~{thing}," said {e}.
| {T} {n} found a~[tiny/small] seed in a~{matadj} box. "I will plant it," {he} said. "It may become a~{thing}."
- {n} dug a hole in the [soft earth/garden], put in the seed and covered it [with soil/with care].
| {He} took a~{col} pot, filled it with soil and [planted the seed/put the seed inside].
- Every day, {he} gave it water. But nothing [happened/came up].
| {n} watered it every morning, but for many days there was nothing to see.
? "Why does it not grow?" {he} asked. "Be patient," said {e}.
| {o} the {ok} laughed and said, "It is only a stone." But {n} did not stop.
+ Then, one morning, there was a small green leaf! {n} [jumped for joy/called {e}/could not believe it].
| After two weeks, a little green tip came out of the soil. "It is growing!" [cried/said] {n}.
- The sun shone, the rain fell, and the plant grew [taller/bigger] every day.
| {n} kept it safe from the wind and [took away the weeds/gave it water when it was dry].
- In [summer/the summer], {n} had a~[tall/strong/beautiful] {thing}. Everyone came to see it.
| By the end of summer, the {thing} was taller than {n}.
- "You took good care of it," said {e}. {n} was very proud.
| {n} showed it to {o} the {ok}. "[I want to plant one too/I will plant one too]," said {o}.
# market
thing = hat, broom, basket, pot, lamp, blanket, coat, bell, cup, teapot, bucket
lesson = Honest people are happy people.|A kind heart is worth more than gold.|Money is not everything.
- {T} {n} went to the market to buy {goods}. {He} had [three/four/five/ten] coins in {his} pocket.
| {T} {e} sent {n} to the market to buy {goods}. "Do not lose your money," said {e}.
- The market was full of [people/noise and colour]. There were {food}, {food2} and [flowers/warm bread/pots and pans]
  everywhere.
| It was a long way, but {n} [sang a song/liked to walk]. At last {he} saw the [tents/colours] of the market.
- On one table, {n} saw a~{col} {thing} made of {mat}. {He} liked it very much.
| Then {n} saw a beautiful {col} {thing}. "How much is it?" {he} asked.
+ But then {he} saw {o} the {ok}, who [was crying/looked very sad]. "I have lost all my money," said {o}.
| Nearby stood {o}, a~{ok}. "I have no money for [bread/food]," said {o} [quietly/sadly].
- {n} looked at the {thing} and then at {o}. {He} gave {o} [two coins/one of {his} coins/some of the food].
| "I do not need a~{thing}," said {n}. "Here, take [these coins/some of my money]."
- "You are very kind," said {o}. "[I will not forget it/Thank you with all my heart]."
| {o} thanked {him} [again and again/with tears in {ohis} eyes].
- The seller had seen everything. "Take the {col} {thing}," the seller said. "It is a gift for a good heart."
| A week later, {o} came to {n}'s door and brought the {col} {thing}. "This is for you," said {o}.
- {n} went home with {goods} and the {col} {thing}.
| At home, {n} told {e} what had happened. {E} was very proud of {him}.
# pet
thing = bird, kitten, puppy, snail, butterfly, chick, goldfish, duckling, baby mouse
lesson = Love means taking care.|Every small creature needs a friend.|To care for others is a joy.
- {T} {n} heard a small sound [in {area}/by the door/near the fence]. It was a tiny {thing}!
| {T} {n} found a tiny {thing} [under a bush/beside the path/near the old wall].
- It was [cold and hungry/weak and wet/all alone], and it looked [at {n}/up] with big eyes.
| The little {thing} was [alone/lost], and it could not find its mother.
- "Poor little {thing}," said {n}. "I will take care of you."
| {n} picked it up [gently/carefully] and took it home.
+ {He} made a soft bed in a~{col} box and gave it [some food and water/fresh water/warm food].
| {o} the {ok} brought a~{col} box, and {n} put soft [grass/wool] into it.
- "What shall we call it?" asked {o}. "Its name is {pname}," said {n}.
| {n} named the {thing} {pname}.
pname = Spot, Button, Crumb, Star, Cloud, Dot, Bean, Berry, Twinkle, Drop, Cookie, Tiny
- Every day, {pname} grew [stronger/bigger]. It [followed {n} everywhere/liked to sit near {n}].
| {n} fed {pname} every morning, and soon the little {thing} was [strong/healthy] and happy.
? {E} came to see it. "You are taking good care of {pname}," said {e}.
- One day, {pname} could go [out/back to its family]. But it [chose to stay/came back to visit {n} every day].
| {n} and {pname} [became good friends/played together every day].
# journey
thing = mountain, sea, big lake, lighthouse, old castle, waterfall, great tree, far island
lesson = The way is as good as the goal.|Every long way begins with one step.|A journey is better with a friend.
- {T} {n} wanted to see the {thing}. {E} had told {him} many stories about it.
| "Have you ever seen the {thing}?" asked {e}. {n} had not. {T} {he} decided to go there.
- {He} packed {goods} and a~{col} blanket and asked {o} the {ok} to come too.
| {o}, a~{ok}, wanted to come with {him}. They took {goods} and a~{col} map.
- They walked over [hills/fields] and through [forests/valleys]. Their feet [hurt/were tired], but they did not stop.
| First they crossed a~[river/bridge], and then they climbed a~[steep/long] hill.
? At night, they slept under a tree and [looked at the stars/listened to the wind].
| When it rained, they sat under a~[rock/big tree] and ate {food}.
+ On the second day, they [lost the way/did not know where to go]. "[Which way shall we take/Left or right]?" asked {o}.
| Then the path was gone. "I think we are lost," said {o}.
- {n} looked at the sun and thought. "[The sun rises in the east/We must go to the west], so this is the right way,"
  {he} said.
| A~[little bird/friendly crow/grey mouse] showed them the right way, and {n} thanked it.
- At last, they saw the {thing}. It was [bigger/more beautiful] than they had dreamed.
| And then, there it was: the {thing}! They stood still and [said nothing/looked at it for a long time].
- "We did it," said {o}. They sat down and ate the rest of their food.
| {n} took a small [stone/shell/leaf] home for {e}.
# snow
season = winter
thing = snowman, snow house, snow castle, snow rabbit, snow bear
lesson = Some things are only here for a while, so enjoy them.|Winter is fun with a friend.|Good things come back.
- {T} {n} saw that the whole world was white. "Snow!" {he} [cried/shouted].
| It had snowed all night. {T} {n} put on {his} {col} scarf and ran outside.
- {He} called {o} the {ok}, and together they made a~[big/fine/tall] {thing}.
| "Let us make a~{thing}," said {o} the {ok}, who was already [outside/waiting].
- They [rolled/pushed] the snow until their hands were [cold/red and cold].
| It took them [all morning/two hours], and they laughed all the time.
- They used [stones/two buttons] for the eyes and gave the {thing} a~{col} hat.
| In the end, they put a~{col} hat on top of it. "It looks so funny," said {o}.
? Then they threw snowballs, and {n} [hit a tree/fell into the soft snow].
+ Later, {e} gave them hot [soup/cocoa/tea] and {food}.
| When they were cold, they went inside and drank hot [milk/cocoa/tea] by the fire.
- But after [a week/some days], the sun came out, and the {thing} began to melt. {n} was sad.
| Then the warm days came. "Our {thing} is getting smaller," said {n} sadly.
- "Do not be sad," said {o}. "Next winter, we will make a new one."
| "Snow becomes water, and water helps the flowers grow," said {e}. "And next winter, the snow will come back."
# worker
thing = hen, goat, hat, broom, lamp, cart, bell, coat, bucket, blanket, clock, donkey
lesson = Kind people are never poor.|One good turn brings another.|Good things come to those who share.
- The {k} went to the market to buy {goods} and {goods2}.
| The {k} went to the market to buy {goods}.
| The {k} went to the market to buy a~{thing} and {goods}.
| {T} the {k} went to the market to buy {goods}.
| There was once a~{k} who needed {goods}. {T} {he} went to the market.
- It was a~{sadj} {season} {part}, and the road was [long/dusty/full of people/quiet].
| {He} had a [big/brown/new] basket and [a few/seven/eight/nine] coins, and {he} sang on the way.
- On the way, the {k} met a~{ok} named {o}, who [was carrying a heavy bag/had lost the way/was sitting on a stone].
| By the road sat {o}, a~{ok} who looked [tired/sad/cold and hungry].
- "Can I help you?" asked the {k}. "Yes, please," said {o}. "I have walked [all day/so far], and I am very tired."
| "Where are you going?" asked the {k}. "I want to go [home/to my aunt/to the market]," said {o}, "but I am so tired."
+ The {k} gave {o} some {food} and a drink of water, and they [walked on/went on] together.
| "Come with me," said the {k}. They shared some {food}, and then they [walked on/went on] together.
- At the market, the {k} saw a [fine/beautiful/strong] {thing}, but it cost [too much/ten coins].
| They came to the market. There was a [fine/beautiful] {thing} for sale, but the {k} did not have enough money.
- "That man is my uncle," said {o}. "[I will talk to him/Let me ask him]." The man smiled and [gave them a good
  price/gave it away for one coin].
| {o} told the seller how kind the {k} had been. "Then you shall have it for one coin," said the seller.
- The {k} [thanked them/was very happy] and went home with the {thing} and {goods}.
| In the evening, the {k} came home with the {thing}, {goods} and a new friend.
? From then on, {o} visited the {k} every [week/Sunday/month].
# lostchild
thing = lantern, bell, whistle, drum, flag
lesson = Stay calm when you are lost.|There is always someone who can help.|Kind friends bring you home.
- {T} {n} walked too far into {area}. When {he} looked around, {he} did not know the way home.
| {T} {n} was picking flowers in {area}. {He} went on and on, and soon {he} was lost.
- It was getting [late/dark], and {he} could hear [the wind/an owl] in the trees.
| "Where am I?" {he} asked. Everything looked [strange/the same].
- {n} sat down on a stone and tried [not to cry/to stay calm].
| {His} heart beat fast, but {he} told {self} to stay calm.
+ Far away, {e} and {o} the {ok} were looking for {him}. {o} carried a~{col} {thing}.
| At home, {e} was worried. {Ehe} took a~{col} {thing} and went out with {o} the {ok}.
- "{n}! {n}!" they called. {n} heard [them/a voice] and [shouted/called back], "I am here!"
| Suddenly {n} heard the voice of {o}. "I am here!" {he} shouted [as loudly as {he} could/with all {his} strength].
- Then {he} saw the {col} {thing} between the trees and ran to it.
| {o} held the {col} {thing} high, so {n} could find the way to them.
- {E} [took {him} in {ehis} arms/held {him} tight]. "I am so glad we found you," {ehe} said.
| "You did the right thing when you stayed in one place," said {e}.
? They walked home together and had [soup/{food} and warm milk].
"""

# Little passages with questions: sentences, then "question ; answer" lines.
PASSAGES_TEXT = """
{n} lives {home}. {His} favourite colour is {col}. {He} has a~{mat} {thing} and plays with it every {part}.
Where does {n} live?;{n} lives {home}.
What is {n}'s favourite colour?;{n}'s favourite colour is {col}.
What does {n} play with?;{n} plays with a~{mat} {thing}.
When does {n} play with the {thing}?;{n} plays with the {thing} every {part}.
#
{time}, {n} went to {area} with {o}. They took {goods} with them. They were happy because {why}.
Where did {n} and {o} go?;{n} and {o} went to {area}.
Who went to {area} with {n}?;{o} went to {area} with {n}.
What did they take with them?;They took {goods} with them.
Why were they happy?;They were happy because {why}.
#
{n} lost a~{col} {thing}. {O} helped to look for it. They found it {spot}. {n} said thank you to {o}.
What did {n} lose?;{n} lost a~{col} {thing}.
Who helped {n}?;{o} helped {n}.
Where did they find the {thing}?;They found the {thing} {spot}.
What colour was the {thing}?;The {thing} was {col}.
#
{n} has {num} {food}. {He} gives one of them to {o}. {o} is hungry and eats it {spot}.
How many {food} does {n} have at first?;{n} has {num} {food} at first.
Who gets one of the {food}?;{o} gets one of the {food}.
Where does {o} eat?;{o} eats {spot}.
Why does {o} eat it?;{o} eats it because {ohe} is hungry.
#
{n} works as a~{job}. Every day, {he} {does}. After work, {he} meets {o} in {area}, and they eat {food}.
What is {n}'s job?;{n} is a~{job}.
What does {n} do every day?;Every day, {n} {does}.
Whom does {n} meet after work?;{n} meets {o} after work.
What do they eat?;They eat {food}.
#
The {ok} was called {o}. It lived {spot} in {area}. On {day}, {n} gave it a~{col} {thing}.
What was the {ok} called?;The {ok} was called {o}.
Where did the {ok} live?;The {ok} lived {spot} in {area}.
What did {n} give to the {ok}?;{n} gave a~{col} {thing} to the {ok}.
On which day did {n} give it the {thing}?;{n} gave it the {thing} on {day}.
#
{n} could not go out on {day} because {whynot}. {He} stayed at home and made a~{thing} of {mat2}. In the evening, {e}
  came.
Why could {n} not go out?;{n} could not go out because {whynot}.
What did {n} make?;{n} made a~{thing} of {mat2}.
Who came in the evening?;{E} came in the evening.
On which day did {n} stay at home?;{n} stayed at home on {day}.
#
{o} is older than {n}. {n} is {num} years old, and {he} likes {food}. On {day}, they will go to {area} together.
Who is older, {n} or {o}?;{o} is older than {n}.
How old is {n}?;{n} is {num} years old.
What does {n} like?;{n} likes {food}.
When will they go to {area}?;They will go to {area} on {day}."""
SPOTS = """under a tree|near the gate|behind the house|on the bench|by the pond|under the bridge|beside the wall|in
the tall grass|
next to the well|on the stairs|in the barn|near the old mill|behind the fence|on the hill"""
WHY = """the sun was shining|it was a holiday|they liked to walk|it was {n}'s birthday|they were best friends|the rain
had stopped|
they had no school|the food was good|they saw a rainbow"""
WHYNOT = """it was raining|{he} was ill|the snow was too deep|the wind was too strong|{he} had hurt {his} foot|it was
too cold|
{he} had no dry boots|there was a storm|{he} had much work to do"""
PASSAGE_THINGS = """ball kite boat hat cup bell drum box basket bag doll lamp chair book ring scarf puppet mask toy
flag bowl tower crown whistle""".split()

# Sentences about living things and objects, for instructions: subject, then endings.
ENDINGS: dict[str, str] = {
    "The farmer went to the market to buy": """{goods} and {goods2}.|{goods}, {goods2} and a new broom.|{goods}.|a young
goat and {goods}.|{goods}, but he forgot to bring his money.|two hens and {goods}.""",
    "The children ran outside because": """the sun was shining.|it was snowing.|they heard music.|they wanted to play
ball.|
they saw a rainbow.|the rain had stopped.""",
    "When it rains, I": "stay at home.|take my umbrella.|wear my boots.|read a book.|listen to the drops on the roof.",
    "The cat sat on": "the warm mat.|the window sill.|the old chair.|the roof.|the kitchen table.|the garden wall.",
    "In winter, the lake": "is covered with ice.|freezes.|is cold and still.|is white with snow.",
    "The baker gets up early to": "bake fresh bread.|light the oven.|make bread and buns.|mix the dough.",
    "My grandmother likes to": """bake {food} cakes.|read by the fire.|work in the garden.|tell stories.|drink tea.|
knit socks.""",
    "At night, the owl": "hunts for mice.|hoots in the wood.|flies over the fields.|opens its big eyes.",
    "The old house on the hill": """has a~{col} door.|has been empty for years.|belongs to a painter.|has {num}
windows.|
is made of stone.|looks over the sea.""",
    "Before you go to bed,": """brush your teeth.|close the window.|turn off the light.|say good night.|put your toys
away.""",
    "We went to the sea and": """swam in the water.|built a castle of sand.|found {num} shells.|watched the ships.|ate
{food}.""",
    "If you are thirsty,": "drink some water.|have a glass of milk.|you should drink something.",
    "The dog barked because": """it heard a noise.|someone was at the door.|it saw a cat.|it wanted to go out.|it was
hungry.""",
    "The teacher asked the class to": """open their books.|draw a~{col} house.|count to {num}.|write a short story.|
sing a song.|
be quiet.""",
}
ANIMAL_DOES = """The {adj} {x} [slept/rested/sat] {spot}.|A~{x} [lives/hides] {spot}.|The {x} [ran/went] [through the
field/
across the road/over the hill/into the woods] to find [food/its friends/its {young}].|[Yesterday/This morning/Last
week], I saw a~{x}
{spot}.|The {x} looked at me [and went away/with big eyes/for a moment].|My [uncle/aunt/friend] once saw a~{adj} {x}
{spot}.|
In {season}, the {x} likes to rest {spot}."""
THING_DOES = """The {col} {x} was {spot}.|I [left/found/saw/forgot] my {col} {x} {spot}.|[My sister/My brother/{n}]
has a~{col} {x}.|
There is a~{col} {x} {spot}.|{n} put the {x} into a~{col} bag.|We bought a~{col} {x} [on {day}/for {n}/at the market].|
The {x} is [old/new],
but it is still {col}."""
