"""Sentences in many languages, for the calibration text: templates filled with numbers and names.

The same sentences in every language, so that pairs of them are translations.
"""

from tools.demo_words import Source

# name, then: a train leaves; a price; the weather; a question; an opinion; a rule; an age.
_SENTENCES: dict[str, tuple[str, ...]] = {
    "English": (
        "The train to {city} leaves at {hour}:{minute:02}.",
        "{name} bought {count} books and paid {price} euros.",
        "Tomorrow it will rain, and it will be about {degrees} degrees.",
        "Could you tell me where the nearest station is?",
        "I think that the new museum in {city} is worth a visit.",
        "Please switch off the light before you leave the room.",
        "{name} has worked at the hospital for {count} years.",
    ),
    "German": (
        "Der Zug nach {city} fährt um {hour}:{minute:02} Uhr ab.",
        "{name} hat {count} Bücher gekauft und {price} Euro bezahlt.",
        "Morgen wird es regnen, und es werden etwa {degrees} Grad.",
        "Könnten Sie mir sagen, wo der nächste Bahnhof ist?",
        "Ich finde, dass sich ein Besuch im neuen Museum in {city} lohnt.",
        "Bitte schalten Sie das Licht aus, bevor Sie den Raum verlassen.",
        "{name} arbeitet seit {count} Jahren im Krankenhaus.",
    ),
    "French": (
        "Le train pour {city} part à {hour} h {minute:02}.",
        "{name} a acheté {count} livres et a payé {price} euros.",
        "Demain il pleuvra et il fera environ {degrees} degrés.",
        "Pourriez-vous me dire où se trouve la gare la plus proche ?",
        "Je pense que le nouveau musée de {city} mérite une visite.",
        "Veuillez éteindre la lumière avant de quitter la pièce.",
        "{name} travaille à l'hôpital depuis {count} ans.",
    ),
    "Spanish": (
        "El tren a {city} sale a las {hour}:{minute:02}.",
        "{name} compró {count} libros y pagó {price} euros.",
        "Mañana lloverá y habrá unos {degrees} grados.",
        "¿Podría decirme dónde está la estación más cercana?",
        "Creo que el nuevo museo de {city} merece una visita.",
        "Por favor, apague la luz antes de salir de la habitación.",
        "{name} trabaja en el hospital desde hace {count} años.",
    ),
    "Italian": (
        "Il treno per {city} parte alle {hour}:{minute:02}.",
        "{name} ha comprato {count} libri e ha pagato {price} euro.",
        "Domani pioverà e ci saranno circa {degrees} gradi.",
        "Potrebbe dirmi dov'è la stazione più vicina?",
        "Penso che il nuovo museo di {city} meriti una visita.",
        "Per favore, spenga la luce prima di lasciare la stanza.",
        "{name} lavora in ospedale da {count} anni.",
    ),
    "Portuguese": (
        "O comboio para {city} parte às {hour}:{minute:02}.",
        "{name} comprou {count} livros e pagou {price} euros.",
        "Amanhã vai chover e vão estar cerca de {degrees} graus.",
        "Pode dizer-me onde fica a estação mais próxima?",
        "Acho que o novo museu de {city} merece uma visita.",
        "Por favor, apague a luz antes de sair da sala.",
        "{name} trabalha no hospital há {count} anos.",
    ),
    "Dutch": (
        "De trein naar {city} vertrekt om {hour}.{minute:02} uur.",
        "{name} kocht {count} boeken en betaalde {price} euro.",
        "Morgen gaat het regenen en wordt het ongeveer {degrees} graden.",
        "Kunt u mij zeggen waar het dichtstbijzijnde station is?",
        "Ik denk dat het nieuwe museum in {city} een bezoek waard is.",
        "Doe alstublieft het licht uit voordat u de kamer verlaat.",
        "{name} werkt al {count} jaar in het ziekenhuis.",
    ),
    "Swedish": (
        "Tåget till {city} går klockan {hour}.{minute:02}.",
        "{name} köpte {count} böcker och betalade {price} euro.",
        "I morgon kommer det att regna och bli omkring {degrees} grader.",
        "Kan du säga mig var närmaste station ligger?",
        "Jag tycker att det nya museet i {city} är värt ett besök.",
        "Släck lampan innan du lämnar rummet, tack.",
        "{name} har arbetat på sjukhuset i {count} år.",
    ),
    "Polish": (
        "Pociąg do {city} odjeżdża o {hour}:{minute:02}.",
        "{name} kupuje {count} książek i płaci {price} euro.",
        "Jutro będzie padać i będzie około {degrees} stopni.",
        "Czy może mi pan powiedzieć, gdzie jest najbliższy dworzec?",
        "Myślę, że nowe muzeum w {city} jest warte odwiedzenia.",
        "Proszę zgasić światło przed wyjściem z pokoju.",
        "{name} pracuje w szpitalu od {count} lat.",
    ),
    "Turkish": (
        "{city} treni saat {hour}:{minute:02}'de kalkıyor.",
        "{name} {count} kitap aldı ve {price} euro ödedi.",
        "Yarın yağmur yağacak ve hava yaklaşık {degrees} derece olacak.",
        "En yakın istasyonun nerede olduğunu söyler misiniz?",
        "Bence {city} şehrindeki yeni müze görülmeye değer.",
        "Odadan çıkmadan önce lütfen ışığı kapatın.",
        "{name} {count} yıldır hastanede çalışıyor.",
    ),
    "Russian": (
        "Поезд в {city} отправляется в {hour}:{minute:02}.",
        "{name} покупает книги ({count}) и платит {price} евро.",
        "Завтра будет дождь и около {degrees} градусов.",
        "Скажите, пожалуйста, где находится ближайшая станция?",
        "Я думаю, что новый музей в городе {city} стоит посетить.",
        "Пожалуйста, выключайте свет, когда выходите из комнаты.",
        "Стаж работы в больнице ({name}), в годах: {count}.",
    ),
    "Greek": (
        "Το τρένο για {city} φεύγει στις {hour}:{minute:02}.",
        "{name}: {count} βιβλία, {price} ευρώ.",
        "Αύριο θα βρέξει και θα έχει περίπου {degrees} βαθμούς.",
        "Μπορείτε να μου πείτε πού είναι ο πλησιέστερος σταθμός;",
        "Νομίζω ότι το νέο μουσείο ({city}) αξίζει μια επίσκεψη.",
        "Παρακαλώ σβήστε το φως πριν βγείτε από το δωμάτιο.",
        "{name} εργάζεται στο νοσοκομείο εδώ και {count} χρόνια.",
    ),
    "Chinese": (
        "开往{city}的火车{hour}点{minute:02}分出发。",
        "{name}买了{count}本书，一共付了{price}欧元。",
        "明天会下雨，气温大约{degrees}度。",
        "请问最近的车站在哪里？",
        "我觉得{city}的新博物馆值得一看。",
        "离开房间之前请关灯。",
        "{name}在医院工作了{count}年。",
    ),
    "Japanese": (
        "{city}行きの電車は{hour}時{minute:02}分に出発します。",
        "{name}さんは本を{count}冊買って、{price}ユーロ払いました。",
        "明日は雨で、気温は{degrees}度くらいになるでしょう。",
        "一番近い駅はどこか教えていただけますか。",
        "{city}の新しい博物館は行く価値があると思います。",
        "部屋を出る前に電気を消してください。",
        "{name}さんは病院で{count}年間働いています。",
    ),
    "Korean": (
        "{city}행 기차는 {hour}시 {minute:02}분에 출발합니다.",
        "{name} 씨는 책 {count}권을 사고 {price}유로를 냈습니다.",
        "내일은 비가 오고 기온은 약 {degrees}도입니다.",
        "가장 가까운 역이 어디인지 알려 주시겠어요?",
        "{city}의 새 박물관은 가 볼 만하다고 생각합니다.",
        "방을 나가기 전에 불을 꺼 주세요.",
        "{name} 씨는 병원에서 {count}년 동안 일했습니다.",
    ),
    "Arabic": (
        "يغادر القطار إلى {city} في الساعة {hour}:{minute:02}.",
        "{name}: عدد الكتب {count}، والثمن {price} يورو.",
        "غدا سيهطل المطر وستكون الحرارة حوالي {degrees} درجة.",
        "هل يمكنك أن تخبرني أين أقرب محطة؟",
        "أعتقد أن المتحف الجديد في {city} يستحق الزيارة.",
        "من فضلك أطفئ الضوء قبل مغادرة الغرفة.",
        "سنوات العمل في المستشفى ({name}): {count}.",
    ),
    "Hindi": (
        "{city} जाने वाली ट्रेन {hour}:{minute:02} बजे चलती है।",
        "{name} ने {count} किताबें खरीदीं और {price} यूरो दिए।",
        "कल बारिश होगी और तापमान लगभग {degrees} डिग्री रहेगा।",
        "क्या आप बता सकते हैं कि सबसे नज़दीकी स्टेशन कहाँ है?",
        "मुझे लगता है कि {city} का नया संग्रहालय देखने लायक है।",
        "कृपया कमरे से निकलने से पहले बत्ती बंद कर दें।",
        "अस्पताल में काम के वर्ष ({name}): {count}।",
    ),
}
LANGUAGES = tuple(_SENTENCES)


def _slots(source: Source) -> dict[str, str | int]:
    return {
        "city": source.city(),
        "name": source.name(),
        "hour": source.rng.randint(6, 23),
        "minute": source.rng.randint(0, 59),
        "count": source.rng.randint(5, 20),
        "price": source.rng.randint(10, 300),
        "degrees": source.rng.randint(5, 30),
    }


def foreign_text(source: Source) -> str:
    """A paragraph in one language."""
    sentences = _SENTENCES[source.pick(LANGUAGES[1:])]
    chosen = source.rng.sample(sentences, source.rng.randint(3, len(sentences)))
    return " ".join(sentence.format(**_slots(source)) for sentence in chosen)


def translation(source: Source) -> tuple[str, str]:
    """A request to translate, and the translation."""
    start, end = source.rng.sample(LANGUAGES, 2)
    index = source.rng.randrange(len(_SENTENCES[start]))
    slots = _slots(source)
    sentence = _SENTENCES[start][index].format(**slots)
    request = source.pick(("Translate into {}: {}", "How do you say this in {}? {}", "To {}: {}"))
    return request.format(end, sentence), _SENTENCES[end][index].format(**slots)
