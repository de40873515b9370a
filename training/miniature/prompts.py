"""What telephone systems say, and lists of common words: a grammar of its own, with more words than the others have.

The recorded prompts of a person are a test set. This was written without them, from what such systems say in general; none of them is
among its first 10,000 sentences.
"""

import random

from . import facts
from .sentences import Line, capitalized, distinct, number


KEYS = "the pound key/the star key/zero/one/two/three/four/five/six/seven/eight/nine".split("/")
ONE = "caller agent operator participant member user administrator leader guest customer manager supervisor person".split()
MANY = "callers agents operators participants members users guests customers people".split()
THINGS = (
    "message/greeting/password/mailbox/extension/recording/account/conference/directory/folder/request/order/call/line/queue/"
    "number/entry/code/name/address/appointment/reservation/payment/invoice/ticket/transfer/connection/announcement/schedule/"
    "reminder/telephone number/mailbox number/account number/extension number/conference number/security code/area code/"
    "pass code/credit card/voice mail/personal greeting/busy greeting/temporary greeting/forwarding number/language/menu/"
    "system clock/wake up call/voice message"
).split("/")
PLURALS = (
    "messages/greetings/recordings/accounts/calls/lines/numbers/entries/names/options/settings/seconds/minutes/hours/days/"
    "attempts/digits/letters/characters/dollars/cents/units/reservations/tickets/matches/voice messages/urgent messages/"
    "saved messages/faxes"
).split("/")
ACTS = (
    "record/listen to/save/delete/erase/change/review/play/repeat/forward/cancel/continue/confirm/accept/enter/send/skip/mark/"
    "replay/rewind/pause/restore/activate/remove/hear/check/reset/update/unlock/lock/transfer/return/store/create/edit/verify/"
    "select"
).split("/")
DONE = (
    "recorded/saved/deleted/erased/changed/forwarded/cancelled/confirmed/accepted/received/sent/activated/deactivated/removed/"
    "reset/updated/unlocked/locked/transferred/stored/created/selected/enabled/disabled/rejected/parked/answered/muted/"
    "disconnected/verified/marked as urgent/added to the list/turned on/turned off/put on hold/set to the default"
).split("/")
STATES = (
    "available/not available/unavailable/busy/on the phone/not logged in/logged in/away from the desk/in a meeting/on hold/"
    "on vacation/invalid/not valid/incorrect/correct/wrong/full/empty/closed/open/locked/not answering/ready/not responding/"
    "out of service/unknown/required/not allowed/in use/waiting/active/not active/protected/temporarily unavailable/"
    "not recognized/too short/too long"
).split("/")
FEATURES = (
    "call forwarding/call waiting/do not disturb/call recording/caller identification/voice mail/speed dial/conference calling/"
    "music on hold/call screening/automatic redial/follow me/the speaker phone/the night service/remote access/call transfer/"
    "three way calling/paging"
).split("/")
PLACES = (
    "the main menu/the previous menu/the directory/the operator/the conference/the queue/the next message/the previous message/"
    "the first message/the last message/the beginning/the end/the call center/the mailbox/the waiting room/the help desk/"
    "the front desk/the sales department/the service department/customer support/technical support/the billing department/"
    "the information desk"
).split("/")
FOLDERS = "inbox/work/family/friends/old messages/new messages/personal/urgent/archive/trash".split("/")
WAYS = "loudly clearly slowly now again later quickly carefully immediately shortly soon automatically".split()
REASONS = (
    "the connection failed/the line is bad/there was an error/the system is down/nobody answered/the number was changed/"
    "the lines are full/the time is up/your session has expired/the mailbox is full/the server is not responding/"
    "no one is available/the password is wrong/your account has no credit/the network is busy/the service is not available/"
    "you did not enter anything/we could not hear you"
).split("/")


def _prompt(rng: random.Random) -> str:
    act, other, thing, plural, done, state = (rng.choice(words) for words in (ACTS, ACTS, THINGS, PLURALS, DONE, STATES))
    key, place, feature, folder, way, reason = (rng.choice(words) for words in (KEYS, PLACES, FEATURES, FOLDERS, WAYS, REASONS))
    person, many, count = rng.choice(ONE), rng.choice(MANY), number(rng.randint(2, 99))
    digits = " ".join(rng.choice(facts.ONES[:10]) for _ in range(rng.randint(3, 4)))
    told = [
        f"press {key} to {act} this {thing}",
        f"press {key} to {act} your {thing}",
        f"press {key} to return to {place}",
        f"to {act} the {thing}, press {key}",
        f"to {act} or {other} your {plural}, press {key}",
        f"for {feature}, press {key}",
        f"for more options, press {key}",
        f"if you want to {act} the {thing}, press {key}, otherwise press {rng.choice(KEYS)}",
        f"if you know your party's extension, dial it {way}",
        f"enter the {thing}, followed by {key}",
        f"enter your {thing}, then press {key}",
        f"enter the first {number(rng.randint(2, 5))} letters of the {person}'s last name",
        f"enter the {number(rng.randint(2, 12))} digit {thing}",
        f"{act} your {thing} after the tone",
        f"{act} your {thing} at the beep, and hang up when you are finished",
        f"say your name {way} and press {key}",
        f"speak {way} after the beep",
        f"hold on while we {act} your {thing}",
        f"stay on the line and your call will be {done} {way}",
        f"wait a moment while I try to {act} that {thing}",
    ]
    said = [
        f"your {thing} has been {done}",
        f"your {plural} have been {done}",
        f"the {thing} you have entered is {state}",
        f"the {thing} is {state}",
        f"the {thing} at extension {digits} is {state}",
        f"the {person} is {state}",
        f"the {person} at extension {digits} is {state}",
        f"the {person} you are trying to reach is {state}",
        f"all {many} are currently {state}",
        f"all of our {many} are helping other {rng.choice(MANY)}",
        f"the {many} have been {done}",
        f"you are currently the only {person} in this conference",
        f"you are now entering the conference as a {person}",
        f"there are currently {count} {many} in the {thing}",
        f"there are {count} other {many} waiting in line",
        f"there are no more {plural} in this folder",
        f"there are {count} {plural} in the folder {folder}",
        f"you have {count} {plural} in your {thing}",
        f"you have no {plural}",
        f"you have reached the maximum number of {plural}",
        f"you have {count} {plural} left on your {thing}",
        f"you have entered an {rng.choice(('invalid', 'incorrect', 'unknown', 'empty'))} {thing}",
        f"you have been {done} by the {person}",
        f"you must {act} your {thing} before you {other} it",
        f"you may {act} the {thing} at any time by pressing {key}",
        f"{feature} is now {rng.choice(('on', 'off', 'enabled', 'disabled', 'active', 'activated', 'available'))}",
        f"{feature} has been {done}",
        f"{feature} to extension {digits} has been {done}",
        f"I am sorry, that is not a valid {thing}",
        f"I am sorry, I did not understand your {thing}",
        f"we are sorry, but {reason}",
        f"sorry, {reason}, please try again {way}",
        f"your call cannot be completed because {reason}",
        f"we were unable to {act} your {thing}, because {reason}",
        f"the estimated hold time is currently {count} minutes",
        f"your estimated waiting time is less than {count} {rng.choice(('seconds', 'minutes'))}",
        f"your position in the queue is {count}",
        "your call is very important to us, so please hold",
        f"thank you for your patience, a {person} will be with you {way}",
        f"thank you for calling {place}",
        "this call is being recorded for quality and training",
        f"this {thing} will be {done} in {count} {rng.choice(('seconds', 'minutes', 'hours', 'days'))}",
        f"this is the {thing} of extension {digits}",
        f"you will be {done} when the {person} arrives",
        f"the call to {digits} has been {done}",
        f"the current time is {number(rng.randint(1, 12))} {number(rng.randint(10, 59))} {rng.choice(('a m', 'p m'))}",
        f"{thing} received on {rng.choice(facts.DAYS)} from an unknown {person}",
        f"first {thing}, {rng.choice(FOLDERS)} folder",
        f"{rng.choice(('first', 'last', 'next', 'previous', 'new', 'old', 'urgent'))} {thing} from {digits}",
        f"transferring you to {place}, one moment",
        f"connecting you to {place}",
        f"after the {thing} is {done}, press {key} or simply hang up",
        f"increase or decrease the volume with {key}",
        f"the volume has been {rng.choice(('increased', 'decreased'))}",
        f"too many failed attempts, your {thing} is now {state}",
        f"either the {thing} or the {rng.choice(THINGS)} is {state}",
        f"which {thing} would you like to {act}",
        f"are you sure that you want to {act} all {plural}",
        f"goodbye, and thank you for using our {rng.choice(('service', 'system', 'network', 'company', 'directory'))}",
    ]
    lead = rng.choice(("", "", "", "please ", "to continue, "))
    return rng.choice([*said, *(text if text.startswith(("to ", "for ", "if ")) else lead + text for text in told)])


# Common words that neither grammar has, spoken in no order.
WORDS = (
    "able about above across actually add afternoon ago agree air allow almost alone along already although animal another "
    "anything apartment apply arm army around art ask attack attention authority baby ball base battle beach bear beat become "
    "bed believe best better between beyond big bill bit body born both boss bottom brain branch break bridge bright build burn "
    "business button camera capital card care case cause certain chance change charge child choice church city class climb close "
    "clothes coat collect college common company complete computer concert control copy corner cost could count country couple "
    "course court cover create cross crowd current danger date daughter death decide deep degree describe desert design detail "
    "develop did difference dinner direct discover distance do does done door double doubt down dream dress drive drop during "
    "each earth east easy edge effect eight electric else engine enough entire even event ever every exactly example except "
    "exist expect experience explain face fact fail fair fall famous farm fear feel few field fight figure film final find fine "
    "finger fit flat flight floor flower follow foot force foreign forest forget form fourth freedom friendly front future game "
    "gate general gift glass goal god gold got government grand great ground group grow guess gun had hair half hall happen "
    "hardly hate have health heart heavy held hello herself hide higher history hole holiday hope huge human hundred hurt ice "
    "idea image imagine important include indeed industry instead interest island itself job join judge jump just keep kill kind "
    "kitchen knock knowledge lady laugh law lead learn least leg less lesson level lie life lift likely limit little local lose "
    "loss lot low machine magic mail main major make manner mark market marry master matter maybe mean measure meat medical "
    "memory metal middle might mile military mind mine model modern money month moon moral mountain mouth move movie much must "
    "myself narrow nation nature necessary neck need neither nerve never news nice night noise none north note nothing notice "
    "object offer often oil once only onto operate opinion order other ought outside over own pain paint pair paper parent part "
    "particular pass past path pattern peace perhaps period phrase pick picture piece place plan plant plastic player pleasure "
    "pocket point police poem political pool popular position possible pound power practice prepare present president pretty "
    "price prison private probably problem produce product program promise proof proper public pull purpose push put question "
    "quick quiet quite race raise range rate rather reach real reason remain remember reply report rest result rise risk rock "
    "role roof root rough round row royal rule safe salt same sand scene science score sea search season second secret section "
    "seem sense sentence separate series serious serve several shadow shake shall shape share sharp shell shoot shop shore short "
    "should shoulder shout side sign silence silver simple since single size skin sky sleep slip smell smile smoke society soil "
    "soldier some something song sort soul sound south space special speech speed spend sport spot square stage stair star state "
    "steel step still stone store storm story straight strange stream stretch strike study subject succeed success such sudden "
    "suggest suit supply support suppose sure surface surprise sweet swim system tail talk taste tax teach team tell term test "
    "than that their them themselves then theory these they thick thing think third those though thought thousand through throw "
    "thus tie tiny together tomorrow tonight too tooth top total touch toward town track trade train travel treat trial trip "
    "trouble true truth turn twice type uncle under understand unit until up upon us use usual valley value various very victory "
    "view village visit voice vote wall want war warn waste watch wave way weapon wear weather week weight well were west what "
    "wheel whether while whole why wide wife wild will win window wine wing winner wire wise wish without woman wonder wood word "
    "work world worry worth would write wrong yard year yes yesterday yet yourself youth carrot elephant penguin tiger robot "
    "pirate dragon banana guitar volcano"
).split()


def _word_list(rng: random.Random) -> str:
    return ", ".join(rng.sample(WORDS, rng.randint(3, 7)))


def prompts(count: int, seed: int = 0) -> list[Line]:
    """`count` distinct sentences, three of four of telephone systems; a longer list from the same seed starts with the shorter one."""
    rng = random.Random(f"{seed} prompts")

    def draw() -> Line:
        text = _prompt(rng) if rng.random() < 0.75 else _word_list(rng)
        asks = text.split(", ")[-1].split()[0] in ("which", "are")
        return Line(capitalized(text) + ("?" if asks else "."), "prompt")

    return distinct(draw, count)
