#!/usr/bin/env python3
"""Write the small Korean dialogue-summary data set that ships with the quickstart recipe.

    python tools/make_quickstart_data.py [--output recipes/quickstart]

The rows are invented, so they carry no licence but this project's.  The same seed gives the same bytes on every
machine: only the standard library is used, and only ``random.Random.random()`` feeds the choices.

A scenario is a few lines of text in a small notation:

    = id | topic
    % slot=a/b/c; slot=INVENTORY; slot:flag=INVENTORY     the words that change from row to row
    A: text          a turn; A, B and C become #Person1#, #Person2#, #Person3# in order of appearance
    +A: text         a turn said only when the first proposal is changed later (flag ``+``; ``-`` is its opposite)
    xA: text         a turn said only under flag ``x``
    S: text          the summary
    F: slot slot     the facts a right summary must hold (slots, or literal placeholders)

Inside a text ``(a|b)`` picks one, ``{slot:은}`` writes the word with the particle its last sound asks for, and ``$A`` is
the speaker.  A slot written ``slot:+`` has a rejected first value ``{slot0}`` (``slot:+<``: the later value comes earlier
in the inventory, ``>``: later), which equals ``{slot}`` in the rows without a change: the summary must always hold the
value that was agreed.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.runtime.atomic import write_text_atomically  # noqa: E402

SEED = 20240917
SPLITS = {"train": 2000, "dev": 100, "test": 100}
COLUMNS = ["fname", "dialogue", "summary", "topic", "facts"]
FLAG_RATE = {"+": 0.62, "x": 0.5}

# Inventories shared by many scenarios: a word learnt in one of them is known in all.  No member is a substring of
# another, so that "is this fact in the summary?" is a plain search.
INVENTORIES = {
    "DAY": "월요일/화요일/수요일/목요일/금요일/토요일/일요일",
    "WDAY": "월요일/화요일/수요일/목요일/금요일",
    "OTIME": "오전 9시/오전 11시/오후 1시/오후 2시/오후 3시/오후 5시/오전 10시 30분/오후 4시 30분",
    "ETIME": "저녁 6시/저녁 7시/저녁 8시/오후 5시/오후 4시 30분",
    "DATE": "3월 5일/4월 12일/5월 8일/6월 20일/7월 15일/8월 3일/9월 10일/10월 25일/11월 7일/12월 24일",
    "WON": "2만 원/3만 원/4만 원/5만 원/6만 원/7만 원/8만 원/9만 원",
    "BIGWON": "20만 원/30만 원/40만 원/50만 원/60만 원/70만 원/80만 원/90만 원",
    "NAME": "민수/지영/서준/하은/도윤/수빈/현우/유진/태호/은지",
    "PEOPLE": "두 명/세 명/네 명/다섯 명/여섯 명/여덟 명",
}

SCENARIOS = """
= hospital | 병원 예약
% dept=내과/피부과/안과/치과/이비인후과; day:+=WDAY; time=OTIME; thing=신분증/진료 의뢰서/복용하는 약/검사 결과지
xB: (네, |)한빛병원입니다. 무엇을 도와드릴까요?
A: (안녕하세요. |){dept} 진료를 (예약하고 싶어요.|예약하려고 하는데요.|예약할 수 있을까요?)
B: (언제가 편하세요?|언제로 잡아 드릴까요?|무슨 요일에 오시겠어요?)
A: {day0}에 (가고 싶어요.|갈 수 있어요.|가면 좋겠습니다.)
+B: (죄송하지만 {day0:은} 예약이 다 찼습니다. {day:은} 어떠세요?|아쉽게도 {day0}에는 휴진입니다. {day:은} 괜찮으세요?|{day:은} 어떠세요? {day0:은} 자리가 없어서요.)
+A: (네, 그날도 괜찮아요.|그럼 그날로 할게요.)
B: (그럼 |){time}에 (오시면 됩니다.|오세요.) {thing:을} 꼭 (챙겨 오세요.|가져오셔야 합니다.)
A: (네, 알겠습니다.|네, 감사합니다.|잊지 않고 챙길게요.)
S: $A는 {dept} 진료를 {day} {time:으로} 예약하고, $B는 {thing:을} 가져오라고 안내합니다.
F: dept day time thing

= pharmacy | 약 복용
% ill=감기/두통/배탈/알레르기; count:+=하루 한 번/하루 두 번/하루 세 번; when=식사 전/식사 후/자기 전; avoid=커피/술/우유/찬 음식
A: {ill} 때문에 (왔어요.|약을 사러 왔어요.|고생하고 있어요.) (약 좀 주세요.|좋은 약이 있을까요?)
B: (네, |)이 약이 (잘 들어요.|효과가 좋습니다.) {count0} (드세요.|드시면 됩니다.)
+A: (제가 |)지금 다른 약도 먹고 있는데 괜찮을까요?
+B: (아, 그러면|그렇다면) ({count0} 말고 {count} 드세요.|{count} 드시는 게 좋아요. {count0:은} 안 됩니다.)
A: (언제 먹으면 되나요?|먹는 시간도 정해져 있나요?)
B: {when}에 (드시는 게 좋아요.|드세요.)
A: (조심할 것도 있나요?|먹으면 안 되는 음식이 있나요?)
B: {avoid:은} (꼭 |)(피하세요.|드시지 마세요.)
S: $B는 {ill} 때문에 온 $A에게 약을 {count}, {when}에 먹고 {avoid:은} 피하라고 설명합니다.
F: ill count when avoid

= parcel | 택배 배송
% item=책상/운동화/커피 머신/이불/화분; day:+=DAY; time=OTIME; spot=경비실/문 앞/무인 택배함/관리실
xB: (안녕하세요, |)빠른택배 고객센터입니다.
A: 주문한 {item:이} 언제 (도착하나요?|오는지 궁금해요.|배송되는지 알고 싶습니다.)
B: (확인해 보니 |){day0}에 (도착할 예정입니다.|배송될 예정이에요.)
+A: {day0}에는 집에 (없어요.|아무도 없는데요.) {day:으로} (바꿔 주세요.|바꿀 수 있나요?)
-A: 몇 시쯤 (오시나요?|받을 수 있나요?)
B: (네, |){time}쯤 (기사님이 방문합니다.|배송해 드리겠습니다.)
A: (제가 못 받으면|혹시 제가 없으면) {spot}에 (놓아 주세요.|두고 가 주세요.)
B: (네, 그렇게 전달하겠습니다.|알겠습니다. 기사님께 말씀드릴게요.)
S: $A의 {item:은} {day} {time}쯤 배송될 예정이며, $A는 자신이 없으면 {spot}에 놓아 달라고 부탁합니다.
F: item day time spot

= hotel | 호텔 예약
% date=DATE; room:+=일인실/이인실/온돌방/스위트룸/가족실; night=하룻밤/이틀/사흘/나흘; price=BIGWON
xB: (바다호텔입니다.|안녕하세요, 바다호텔입니다.) 무엇을 도와드릴까요?
A: {date}에 (방을 예약하고 싶습니다.|묵을 방이 있을까요?|객실을 하나 예약하려고요.)
B: (어떤 방을 원하세요?|어떤 객실로 드릴까요?)
A: {room0:으로} (부탁합니다.|주세요.) {night} 동안 (묵을 거예요.|머물 예정입니다.)
+B: (죄송하지만 {room0:은} 모두 나갔고 {room:은} 남아 있습니다.|{room:은} 가능하지만 {room0:은} 남은 방이 없습니다.)
+A: (그럼 그 방으로 하겠습니다.|그것도 괜찮아요.) 요금은 얼마인가요?
-B: (네, 가능합니다.|네, 방이 있습니다.)
-A: 요금은 (얼마인가요?|모두 얼마예요?)
B: (모두|전부) {price}입니다.
A: (좋아요. 그렇게 예약해 주세요.|네, 예약 부탁드려요.)
S: $A는 {date}부터 {night} 동안 묵을 {room:을} {price}에 예약합니다.
F: date room night price

= library | 도서관 이용
% book=역사책/소설책/요리책/과학책/그림책/여행책; week:+=일주일/이 주일/삼 주일/한 달; limit=두 권/세 권/다섯 권/열 권; card=학생증/회원증/주민등록증
A: (저기요, |)이 {book:을} (빌리고 싶은데요.|빌릴 수 있을까요?|빌려 가려고 해요.)
B: (네, |){card:을} (보여 주세요.|주시겠어요?)
A: 여기 있어요. (한 번에 |)몇 권까지 (빌릴 수 있나요?|가능한가요?)
B: {limit}까지 (빌리실 수 있어요.|가능합니다.)
A: {week0} 동안 (봐도 되나요?|빌릴 수 있는 거죠?)
+B: (아니요, 규정이 바뀌어서 {week} 동안 가능해요.|{week} 안에 돌려주셔야 해요. {week0:은} 작년 규정이에요.)
-B: (네, 맞습니다.|네, 그렇습니다.) 
A: (알겠습니다. 감사합니다.|네, 그때까지 반납할게요.)
S: $A는 {card:을} 내고 {book:을} 빌리며, $B는 {limit}까지 {week} 동안 빌릴 수 있다고 알려 줍니다.
F: card book limit week

= interview | 면접 안내
% job=디자이너/개발자/회계사/번역가/연구원; day:+=WDAY; time=OTIME; thing=이력서/자기소개서/졸업 증명서/작품집
A: (안녕하세요, |){job} 면접 때문에 (연락드렸습니다.|전화드렸어요.)
B: (네, 안녕하세요.|아, 네.) 면접은 언제인가요?
A: {day0:으로} (생각하고 있습니다.|예정되어 있습니다.)
+B: {day0}에는 시험이 있어요. {day:은} (안 될까요?|가능할까요?)
+A: (네, 가능합니다.|네, 바꿔 드릴게요.) 그날 {time}까지 오세요.
-B: (네, 갈 수 있습니다.|네, 그날 괜찮습니다.)
-A: (그럼 |){time}까지 오세요.
B: (준비할 것이 있나요?|무엇을 가져가야 하나요?)
A: {thing:을} (한 부 |)(준비해 주세요.|가져오시면 됩니다.)
B: (네, 감사합니다.|알겠습니다.)
S: $A는 $B에게 {job} 면접이 {day} {time:이라}고 알리고 {thing:을} 준비하라고 합니다.
F: job day time thing

= usedgoods | 중고 거래
% item=자전거/노트북/카메라/책장/냉장고/기타; price:+<=WON; place=지하철역/편의점/아파트 정문/시청 앞; time=ETIME
A: (안녕하세요. |){item} (아직 파시나요?|아직 있나요?|사고 싶은데요.)
B: (네, 아직 있어요.|네, 팔고 있어요.) 가격은 {price0}(이에요.|입니다.)
+A: (조금 비싸네요. {price:은} 안 될까요?|{price}에 주시면 안 될까요?)
+B: (좋아요, {price0} 대신 그 가격에 드릴게요.|음, 그렇게 할게요.) 어디서 만날까요?
-A: (좋아요, 살게요.|네, 제가 살게요.)
-B: (그럼 |)어디서 만날까요?
A: {place}에서 (만나요.|뵈면 좋겠어요.)
B: (네, 오늘|좋아요. 오늘) {time}에 (나갈게요.|가겠습니다.)
A: (네, 그때 봬요.|네, 이따 봬요.)
S: $A는 $B의 {item:을} {price}에 사기로 하고, 두 사람은 {time}에 {place}에서 만나기로 합니다.
F: item price time place

= moving | 이사 견적
% date:+=DATE; thing=피아노/침대/에어컨/세탁기/장롱; price=BIGWON; help=포장/청소/정리/운반
A: (이사 견적을 받고 싶어요.|이사하려고 하는데요.) {date0}에 (가능할까요?|되나요?)
+B: {date0}에는 이미 (예약이 있습니다.|일이 잡혀 있어요.) {date:은} (어떠세요?|가능합니다.)
-B: (네, 그날은 가능합니다.|네, 비어 있습니다.) 
A: (네, 좋습니다.|잘됐네요.) (큰 짐은 {thing:이} 있어요.|{thing:이} 좀 무거워요.)
B: 그러면 (모두|전부) {price}입니다.
A: {help}도 (해 주시나요?|부탁드려도 될까요?)
B: (물론이죠.|네, 가격에 들어 있어요.|네, 무료로 해 드립니다.)
S: $A는 {date}에 {thing:이} 포함된 이사를 {price}에 맡기고, {help}까지 도움을 받기로 합니다.
F: date thing price help

= counsel | 학교 상담
% name=NAME; subject=수학/영어/과학/국어/역사; day:+=WDAY; time=OTIME
A: (선생님, 안녕하세요. |)저는 {name} (엄마|아빠)입니다. 상담을 (받고 싶습니다.|하고 싶어요.)
B: (안녕하세요. |){day0} {time}에 (오실 수 있나요?|시간 괜찮으세요?)
+A: {day0}에는 (회사 일이 있어요.|출장이 있습니다.) {day} 같은 시간은 (안 될까요?|어떠세요?)
-A: (네, 갈 수 있습니다.|네, 괜찮아요.) 
B: (네, 좋습니다.|네, 알겠습니다.) (무엇이 걱정되세요?|어떤 점이 고민이세요?)
A: (요즘 |){subject} 성적이 (떨어졌어요.|많이 내려갔어요.)
B: (그럼 |)그날 (자세히|천천히) 이야기해요.
S: {name}의 부모인 $A는 {subject} 성적이 걱정되어 $B와 {day} {time}에 상담하기로 합니다.
F: name subject day time

= restaurant | 식당 예약
% day=DAY; time:+=ETIME; people=PEOPLE; seat=창가 자리/조용한 방/야외 자리/큰 테이블
xB: (네, |)정든식당입니다.
A: {day}에 (예약하고 싶어요.|자리를 예약할 수 있나요?|저녁 예약을 하려고요.)
B: (몇 분이세요?|모두 몇 분이신가요?)
A: {people}(이에요.|입니다.) {time0}에 갈게요.
+B: (죄송하지만 {time0}에는 자리가 없어요. {time:은} 어떠세요?|{time:은} 되는데 {time0:은} 어렵습니다.)
+A: (그럼 그때 갈게요.|네, 괜찮습니다.) {seat:으로} (주세요.|부탁드려요.)
-B: (네, 가능합니다.|네, 자리가 있어요.)
-A: {seat:으로} (주세요.|부탁드려요.)
B: (네, 준비해 놓겠습니다.|네, 예약되었습니다.)
S: $A는 {day} {time}에 {people:이} 앉을 {seat:을} 예약합니다.
F: day time people seat

= delivery | 음식 주문
% food=비빔밥/떡볶이/볶음밥/짜장면/파스타; count:+=한 개/두 개/세 개/네 개; side=콜라/만두/샐러드/튀김; wait=20분/30분/40분/50분
A: (여보세요, |){food} {count0} (배달해 주세요.|주문할게요.)
B: (네, |)주소가 (어떻게 되세요?|어디세요?)
A: (네, |)#Address#입니다. (아, 그리고 |){side}도 (추가해 주세요.|같이 주세요.)
+B: (네, 그럼|네.) {food} {count0} 맞으시죠?
+A: (아니요, {count:으로} 바꿀게요. 친구가 왔어요.|잠깐만요, {count0} 말고 {count:으로} 해 주세요.)
B: (네, |){wait} 정도 (걸립니다.|기다려 주세요.)
A: (네, 감사합니다.|알겠습니다.)
S: $A는 {food} {count}와 {side:을} #Address#로 주문하고, $B는 {wait} 정도 걸린다고 말합니다.
F: food count side wait #Address#

= hair | 미용실
% style=파마/염색/커트/두피 관리; day:+=DAY; time=OTIME; name=NAME
A: (안녕하세요, |){style} (예약하려고 전화했어요.|예약 되나요?)
B: (네, |)원하는 디자이너가 (있으세요?|계신가요?)
A: {name} 선생님께 (받고 싶어요.|부탁드리고 싶어요.) {day0}에 되나요?
+B: {name} 선생님은 {day0}에 (쉬세요.|안 나오세요.) {day:은} (가능해요.|어떠세요?)
+A: (그럼 그날 갈게요.|그날도 좋아요.) 몇 시가 비어 있어요?
-B: (네, 그날 나오세요.|네, 가능해요.)
-A: 몇 시가 비어 있어요?
B: ({time:이} 비어 있어요.|{time}에 오시면 돼요.)
A: (네, 그때 갈게요.|좋아요, 예약해 주세요.)
S: $A는 {day} {time}에 {name} 선생님에게 {style:을} 받기로 예약합니다.
F: day time name style

= bank | 은행 업무
% prod=적금/예금/청년 통장/외화 통장; month:+=12개월/24개월/36개월/48개월; price=BIGWON; thing=신분증/도장/재직 증명서/가족 관계 증명서
xB: (어서 오세요.|안녕하세요.) 어떤 일로 오셨어요?
A: {prod:을} (만들고 싶어요.|하나 만들려고 합니다.)
B: (매달 |)얼마씩 (넣으실 건가요?|저축하실 계획이세요?)
A: {price}씩 {month0} 동안 (할게요.|넣고 싶어요.)
+B: (지금은 {month0} 상품이 없고 {month} 상품이 있습니다.|{month} 상품이 이자가 더 높아요. {month0:은} 이자가 낮습니다.)
+A: (그럼 그걸로 할게요.|좋아요, 그 상품으로 하겠습니다.)
B: {thing:이} (필요합니다.|있어야 해요.)
A: (네, 여기 있어요.|네, 가져왔습니다.)
S: $A는 {thing:을} 내고 매달 {price}씩 {month} 동안 넣는 {prod:을} 만듭니다.
F: thing price month prod

= movie | 영화 약속
% genre=공포 영화/액션 영화/만화 영화/코미디 영화; day=토요일/일요일/금요일/수요일; time:+=ETIME; place=극장 앞/버스 정류장/카페/서점
A: (야, |)이번 {day}에 (영화 볼래?|영화 보러 가자.|시간 있어?)
B: (좋아, |){genre} (보고 싶어.|어때?)
A: (좋지.|그래, 재밌겠다.) {time0} 표로 (예매할까?|끊을까?)
+B: (그때는 아르바이트가 있어. {time:은} 어때?|{time:이} 더 좋아. {time0}에는 못 가.)
+A: (알았어, 그걸로 할게.|그래, 그렇게 하자.) 어디서 만날까?
-B: (그래, 좋아.|응, 딱 좋다.)
-A: 어디서 만날까?
B: {place}에서 (보자.|만나자.)
A: (응, 늦지 마.|좋아, 그때 봐.)
S: $A와 $B는 {day} {time}에 {genre:을} 보기로 하고, {place}에서 만나기로 합니다.
F: day time genre place

= gift | 생일 선물
% name=NAME; item:+=목도리/향수/지갑/시계/장갑/모자; price=WON; shop=백화점/시장/온라인 쇼핑몰/동네 가게
A: (곧 |){name} 생일인데 (뭘 사 줄까?|선물로 뭐가 좋을까?)
B: {item0} (어때?|사 주자.)
+A: {item0:은} (작년에 줬잖아.|벌써 있대.) ({item:은} 어떨까?|{item:이} 좋을 것 같은데.)
-A: (좋은 생각이야.|딱 좋다.)
B: (그래, 좋아.|응, 그러자.) 돈은 {price} 정도면 (되겠지?|충분하겠지?)
A: (응.|그럼.) {shop}에서 (사자.|찾아보자.)
B: (그래, 같이 가자.|알았어, 내일 보자.)
S: $A와 $B는 {name}의 생일 선물로 {price} 정도의 {item:을} {shop}에서 사기로 합니다.
F: name price item shop

= gym | 운동 등록
% sport=수영/요가/필라테스/테니스/태권도; month:+=1개월/3개월/6개월/12개월; price=BIGWON; time=오전 9시/오전 11시/저녁 7시/저녁 8시
A: {sport:을} (배우고 싶어요.|등록하고 싶습니다.) {month0} (등록하면|다니면) 얼마예요?
+B: (지금 {month} 등록이 할인 중이에요. {month0}보다 좋아요.|{month0} 등록은 끝났고 {month} 등록만 남았어요.)
+A: (그럼 그걸로 할게요.|그게 낫겠네요.) 얼마인가요?
B: {price}(입니다.|이에요.)
A: (수업은 |)몇 시에 (있나요?|시작해요?)
B: {time}에 (시작합니다.|있어요.)
A: (좋아요, 등록할게요.|네, 오늘 등록하겠습니다.)
S: $A는 {time}에 시작하는 {sport} 수업을 {price}에 {month} 동안 등록합니다.
F: time sport price month

= carrepair | 자동차 수리
% part=브레이크/타이어/엔진/배터리/와이퍼; price=BIGWON; day:+=WDAY; time=OTIME
A: (차에서 이상한 소리가 나요.|차가 좀 이상해요.|차를 좀 봐 주세요.)
B: (확인해 보니|살펴보니) {part:이} (문제네요.|낡았습니다.|고장 났어요.)
A: (고치는 데 |)얼마나 (드나요?|나올까요?)
B: {price} 정도입니다. {day0}까지 (고쳐 드릴게요.|끝내겠습니다.)
+A: (그날은 제가 차를 써야 해요.|다른 날은 안 되나요?)
+B: (그럼 {day0} 말고 {day}까지 해 드릴게요.|{day}까지 해 보겠습니다. {day0:은} 취소할게요.)
A: (좋아요.|네.) {time}에 (찾으러 올게요.|가지러 오겠습니다.)
B: (네, 알겠습니다.|네, 준비해 놓을게요.)
S: $B는 $A의 차 {part:을} {price}에 고치기로 하고, $A는 {day} {time}에 찾으러 오기로 합니다.
F: part price day time

= rentcar | 렌터카
% car:+=소형차/중형차/전기차/승합차; date=DATE; night=하루/이틀/사흘/나흘; place=공항/기차역/호텔/시내 지점
A: {date}에 차를 (빌리고 싶어요.|빌릴 수 있을까요?)
B: (어떤 차를 원하세요?|어떤 차가 좋으세요?)
A: {car0:으로} (주세요.|부탁합니다.) {night} 동안 (쓸 거예요.|탈 예정이에요.)
+B: {car0:은} (다 나갔어요.|남은 게 없습니다.) {car:은} (있습니다.|어떠세요?)
+A: (그럼 그걸로 할게요.|괜찮아요.) 어디서 받나요?
-B: (네, 있습니다.|네, 가능합니다.)
-A: 차는 어디서 받나요?
B: {place}에서 (받으시면 됩니다.|드리겠습니다.)
A: (네, 감사합니다.|알겠습니다.)
S: $A는 {date}부터 {night} 동안 {car:을} 빌리고 {place}에서 받기로 합니다.
F: date night car place

= train | 기차표 예매
% city=부산/대구/광주/강릉/전주/여수; time:+=OTIME; day=DAY; seat=일반실/특실/창가 쪽 좌석/통로 쪽 좌석
xB: (다음 손님, |)어디까지 가세요?
A: {day}에 {city} 가는 표 (한 장 주세요.|두 장 주세요.|있나요?)
B: (몇 시 기차를 원하세요?|몇 시에 출발하실 건가요?)
A: {time0} 기차(요.|로 주세요.)
+B: (그 기차는 매진이에요. {time} 기차는 있습니다.|{time} 기차만 남았어요. {time0}에는 표가 없습니다.)
+A: (그럼 그걸로 주세요.|네, 그것도 좋아요.)
B: (좌석은 |)어떤 자리로 (드릴까요?|하시겠어요?)
A: {seat:으로} (해 주세요.|부탁합니다.)
S: $A는 {day} {time}에 출발하는 {city}행 기차의 {seat:을} 예매합니다.
F: day time city seat

= flight | 항공권 변경
% city=제주/도쿄/파리/방콕/런던; date:+=DATE; fee=WON; bag=가방 한 개/가방 두 개/가방 세 개
A: {city} 가는 비행기 표를 (바꾸고 싶어요.|변경하려고 합니다.)
B: (언제로 바꿔 드릴까요?|며칠로 변경하시겠어요?)
A: {date0:으로} (부탁합니다.|바꿔 주세요.)
+B: {date0}에는 (빈자리가 없습니다.|운항하지 않습니다.) {date:은} (가능합니다.|어떠신가요?)
+A: (그럼 그날로 하겠습니다.|그날도 괜찮아요.)
B: (네, |)수수료는 {fee}입니다.
A: (짐은 얼마나 실을 수 있나요?|가방은 몇 개까지 되나요?)
B: {bag}까지 (무료입니다.|됩니다.)
S: $A는 {city}행 비행기 표를 {date:으로} 바꾸고, $B는 수수료가 {fee:이}며 {bag}까지 무료라고 알려 줍니다.
F: city date fee bag

= house | 집 구하기
% kind=원룸/아파트/오피스텔/빌라; price:+>=BIGWON; near=지하철역/공원/대학교/시장; day=DAY
A: {near} 근처에 {kind:을} (찾고 있어요.|구하고 있습니다.)
B: (월세는|한 달에) 얼마까지 (생각하세요?|괜찮으세요?)
A: {price0}(까지요.| 정도요.)
+B: (그 가격에는 없어요.|{price0}에는 구하기 어려워요.) {price:이}면 (좋은 집이 있어요.|가능해요.)
+A: (음, 그 정도면 괜찮아요.|그럼 그 집을 볼게요.) 언제 볼 수 있나요?
-B: (마침 좋은 집이 나왔어요.|네, 딱 맞는 집이 있어요.)
-A: 언제 볼 수 있나요?
B: {day}에 (보러 오세요.|보실 수 있어요.)
A: (네, 그때 갈게요.|좋습니다.)
S: $A는 {near} 근처의 월세 {price} {kind:을} {day}에 보러 가기로 합니다.
F: near price kind day

= meeting | 회의 일정
% subj=예산/신제품/광고/채용; day=WDAY; time:+=OTIME; room=대회의실/소회의실/휴게실/강당
A: {subj} 회의를 (언제 할까요?|정해야 합니다.) {day:이} (어떠세요?|좋을 것 같은데요.)
B: (네, 좋습니다.|저는 괜찮아요.) {time0}에 (시작할까요?|하면 어떨까요?)
+A: {time0}에는 (손님이 오세요.|다른 약속이 있어요.) {time:이} (좋겠어요.|낫겠습니다.)
+B: (그렇게 합시다.|네, 그렇게 할게요.) 장소는요?
-A: (네, 그때 합시다.|좋아요.)
-B: 장소는 (어디로 할까요?|어디가 좋을까요?)
A: {room}에서 (해요.|하면 됩니다.)
B: (네, 제가 예약할게요.|네, 모두에게 알리겠습니다.)
S: $A와 $B는 {subj} 회의를 {day} {time}에 {room}에서 하기로 합니다.
F: subj day time room

= report | 보고서 마감
% doc=판매 보고서/연구 보고서/출장 보고서/월간 보고서; day:+<=WDAY; name=NAME; add=그래프/사진/통계 자료/요약문
A: {name} 씨, {doc:은} (다 됐나요?|얼마나 했어요?)
B: 아직 (못 끝냈습니다.|쓰고 있습니다.) {day0}까지 (드려도 될까요?|내겠습니다.)
+A: (사장님이 급하게 찾으세요. {day}까지 주세요.|{day}까지는 받아야 해요. {day0}에는 너무 늦어요.)
+B: (네, 맞추겠습니다.|네, 서두르겠습니다.)
-A: (네, 그렇게 하세요.|그날이면 됩니다.)
-B: (감사합니다.|네, 꼭 지키겠습니다.)
A: (그리고 |){add}도 (넣어 주세요.|꼭 붙이세요.)
B: (네, 알겠습니다.|네, 추가하겠습니다.)
S: $A는 {name}에게 {add:을} 넣은 {doc:을} {day}까지 내라고 합니다.
F: name add doc day

= lost | 분실물
% item=지갑/우산/휴대폰/가방/안경; color=검은색/빨간색/파란색/하얀색; place:+=버스/지하철/택시/화장실/식당; day=WDAY
A: {color} {item:을} (잃어버렸어요.|찾고 있어요.)
B: (어디에서 잃어버리셨어요?|어디에 두고 오셨나요?)
A: {place0}에서 (잃어버린 것 같아요.|잃어버렸어요.)
+B: {place0}에서 (들어온 것은 없는데요.|신고된 게 없어요.) (다시 생각해 보세요.|확실한가요?)
+A: (아, {place}에 두고 온 것 같아요.|생각해 보니 {place}에서 본 게 마지막이에요.)
B: (찾으면 연락드릴게요.|연락처를 알려 주세요.) 
A: #PhoneNumber#로 (전화해 주세요.|연락 주세요.) {day}까지 (필요해요.|꼭 찾고 싶어요.)
B: (네, 알겠습니다.|네, 찾아보겠습니다.)
S: $A는 {place}에서 잃어버린 {color} {item:을} {day}까지 찾고 싶어 하며 연락처로 #PhoneNumber#를 남깁니다.
F: place color item day #PhoneNumber#

= laundry | 세탁소
% item=코트/양복/이불/원피스/셔츠; stain=커피/김치/잉크/기름; day:+=DAY; price=WON
A: 이 {item:을} (맡기고 싶어요.|세탁해 주세요.)
B: (네, 어떤 얼룩인가요?|여기 얼룩은 뭔가요?)
A: {stain} 얼룩(이에요.|입니다.) {day0}까지 되나요?
+B: {day0:은} (좀 어렵고 {day}까지는 됩니다.|힘들어요. {day}에 오세요.)
+A: (네, 그럼 그날 올게요.|할 수 없죠. 그렇게 할게요.) 얼마예요?
-B: (네, 됩니다.|네, 그때까지 해 드려요.)
-A: 얼마예요?
B: {price}(이에요.|입니다.)
A: (여기 있어요.|카드로 낼게요.)
S: $A는 {stain} 얼룩이 묻은 {item:을} {price}에 맡기고 {day}에 찾기로 합니다.
F: stain item price day

= flower | 꽃집
% flower:+=장미/튤립/국화/백합/해바라기; count=열 송이/스무 송이/서른 송이; who=어머니/선생님/이모/할머니; price=WON
xB: 어서 오세요. (무슨 꽃을 찾으세요?|도와드릴까요?)
A: {who}께 드릴 꽃을 (사려고 해요.|찾고 있어요.) {flower0} 있나요?
+B: {flower0:은} (다 팔렸어요.|오늘 안 들어왔어요.) (대신 |){flower:이} (아주 예뻐요.|싱싱해요.)
-B: (네, 오늘 아주 싱싱해요.|네, 방금 들어왔어요.)
A: (그럼 |)그걸로 {count} (주세요.|포장해 주세요.)
B: (네, |)모두 {price}(입니다.|이에요.)
A: (네, 여기 있습니다.|카드로 할게요.)
S: $A는 {who}께 드릴 {flower} {count:을} {price}에 삽니다.
F: who flower count price

= cake | 케이크 주문
% taste:+=초콜릿/딸기/치즈/고구마/녹차; day=DAY; time=OTIME; msg=축하합니다/사랑해요/고맙습니다/힘내세요
A: {day}에 케이크를 (주문하고 싶어요.|하나 부탁드리고 싶어요.)
B: 어떤 맛으로 (하시겠어요?|만들어 드릴까요?)
A: {taste0} 맛(이요.|으로 해 주세요.)
+B: (요즘 {taste0} 재료가 없어요. {taste} 맛은 가능해요.|{taste} 맛이 제일 인기예요. {taste0} 맛은 안 만들어요.)
+A: (그럼 그 맛으로 할게요.|그것도 맛있겠네요.)
B: 글씨도 (써 드릴까요?|넣을까요?)
A: (네, |)'{msg}'라고 써 주세요. {time}에 (찾으러 갈게요.|갈게요.)
B: (네, 준비하겠습니다.|네, 알겠습니다.)
S: $A는 '{msg}'라고 쓴 {taste} 케이크를 주문하고 {day} {time}에 찾기로 합니다.
F: msg taste day time

= exchange | 옷 교환
% item=바지/치마/운동화/재킷/스웨터; why=작아서/커서/길어서/짧아서; color:+=검은색/빨간색/파란색/하얀색/초록색; fee=2천 원/3천 원/4천 원/5천 원
A: (어제 산 |){item:을} (교환하고 싶어요.|바꾸러 왔어요.)
B: (무슨 문제가 있나요?|왜 바꾸려고 하세요?)
A: 조금 {why}요. {color0:으로} (바꿔 주세요.|다른 걸 주세요.)
+B: {color0:은} 맞는 치수가 (없어요.|다 나갔습니다.) {color:은} (있어요.|어떠세요?)
+A: (그럼 그걸로 할게요.|그 색도 예쁘네요.) 돈을 더 내야 하나요?
-B: (네, 여기 있어요.|네, 바꿔 드릴게요.)
-A: 돈을 더 내야 하나요?
B: {fee}만 더 (내시면 됩니다.|주세요.)
A: (네, 알겠습니다.|여기 있습니다.)
S: $A는 {item:이} {why} {color} 제품으로 교환하고 {fee:을} 더 냅니다.
F: item why color fee

= repair | 가전 수리
% item=세탁기/냉장고/에어컨/텔레비전/청소기; sign=소리가 나요/물이 새요/켜지지 않아요/냄새가 나요; day:+=WDAY; time=OTIME
xB: (서비스 센터입니다.|안녕하세요, 서비스 센터입니다.)
A: {item:이} (고장 났어요.|이상해요.)
B: (어떤 문제가 있나요?|증상이 어떤가요?)
A: (어제부터 |){sign}. (빨리 고치고 싶어요.|언제 오실 수 있나요?)
B: {day0}에 (방문해도 될까요?|기사가 갈 수 있습니다.)
+A: {day0:은} 제가 (일해요.|집에 없어요.) {day}에 (와 주세요.|오시면 좋겠어요.)
-A: (네, 괜찮아요.|네, 집에 있어요.)
B: (네, |)그날 {time}에 (가겠습니다.|방문하겠습니다.)
S: $A가 '{sign}'라며 {item} 수리를 요청하고, $B는 {day} {time}에 방문하기로 합니다.
F: sign item day time

= internet | 인터넷 설치
% speed=기본 상품/고속 상품/초고속 상품; date:+=DATE; time=OTIME; price=WON
A: (집에 |)인터넷을 (설치하고 싶어요.|신청하려고 합니다.) {speed:은} 얼마예요?
B: 한 달에 {price}입니다. {date0}에 (설치할까요?|설치해 드릴 수 있어요.)
+A: {date0}에는 (여행을 가요.|아직 이사 전이에요.) {date:으로} (해 주세요.|부탁해요.)
-A: (네, 좋아요.|네, 그날 해 주세요.)
B: 주소를 (말씀해 주세요.|알려 주시겠어요?)
A: #Address#입니다. {time}에 (와 주세요.|오시면 돼요.)
B: (네, 신청됐습니다.|네, 그때 뵙겠습니다.)
S: $A는 한 달에 {price}인 {speed:을} 신청하고, {date} {time}에 #Address#에 설치하기로 합니다.
F: price speed date time #Address#

= vet | 동물병원
% pet=강아지/고양이/토끼/햄스터; sign=기침/설사/구토/재채기; days:+>=사흘/닷새/일주일/열흘; feed=물/간식/채소/죽
A: (선생님, |)우리 {pet:이} (아픈 것 같아요.|이상해요.)
B: (어디가 아픈가요?|어떻게 아픈데요?)
A: (어제부터|자꾸) {sign:을} (해요.|합니다.)
B: 약을 {days0} 동안 (먹이세요.|먹여 보세요.)
+A: (그렇게만 먹여도 되나요?|지난번에도 그랬는데 안 나았어요.)
+B: (그렇다면 {days0} 말고 {days} 동안 먹이세요.|그럼 {days} 동안 먹이는 게 좋겠어요.)
A: 음식은 (뭘 줄까요?|어떻게 할까요?)
B: {feed:을} (많이|자주) 주세요.
S: {sign:을} 하는 {pet:을} 데려온 $A에게 $B는 약을 {days} 동안 먹이고 {feed:을} 주라고 합니다.
F: pet sign days feed

= tutor | 과외 수업
% subject=수학/영어/국어/중국어/과학; day:+=DAY; time=ETIME; price=BIGWON
A: (우리 아이 |){subject} 과외를 (부탁드리고 싶어요.|받고 싶은데요.)
B: (네, |)일주일에 한 번 {day0}에 (하면 어떨까요?|가르칠 수 있어요.)
+A: {day0}에는 (학원에 가요.|다른 수업이 있어요.) {day:은} (안 되나요?|어떠세요?)
+B: (네, 돼요.|네, 그날 할게요.) {time}에 시작하죠.
-A: (좋아요.|네, 그날 괜찮아요.) 몇 시에 하나요?
-B: {time}에 (시작하죠.|하겠습니다.)
A: 한 달에 {price:을} (드리면 될까요?|드릴게요.)
B: (네, 좋습니다.|네, 감사합니다.)
S: $B는 $A의 아이에게 매주 {day} {time}에 {subject:을} 가르치고 한 달에 {price:을} 받기로 합니다.
F: day time subject price

= project | 조별 과제
% subj=환경/경제/음악/건강/교통; part=발표/자료 조사/영상 제작/설문 조사; day:+=WDAY; place=도서관/학생 식당/강의실/카페
A: {subj} 과제 (어떻게 나눌까?|이제 시작해야지.)
B: 내가 {part:을} (맡을게.|할게.)
A: (고마워. |)그럼 {day0}에 모여서 (맞춰 보자.|연습하자.)
+B: (나 {day0}에 시험 있어. {day:은} 어때?|{day:이} 좋겠어. {day0:은} 안 돼.)
+A: (괜찮아, 그날 하자.|그래, 바꾸자.) 어디가 좋을까?
-B: (응, 좋아.|그래, 그러자.)
-A: 어디가 좋을까?
B: {place}(에서 보자.|에서 모이자.)
S: $B가 {subj} 과제의 {part:을} 맡고, 두 사람은 {day}에 {place}에서 모이기로 합니다.
F: subj part day place

= club | 동아리 모임
% club=사진/연극/농구/독서/노래; day=DAY; place:+=학교 앞/운동장/강당/공원/한강; bring=간식/음료수/돗자리/카메라
A: 이번 {day}에 {club} 동아리 (모임 있는 거 알지?|모이는 거 들었어?)
B: (응, 들었어.|아니, 몰랐어.) 어디서 모여?
A: {place0}에서 (모인대.|모일 거야.)
+C: (아니야, {place0}에서 {place:으로} 바뀌었어.|비가 온대서 {place:으로} 바뀌었대.)
B: (아, 그렇구나.|그래, 알았어.) 뭐 (가져갈까?|필요해?)
A: (그럼 너는 |너는 ){bring:을} (가져와.|챙겨 줘.)
B: (알았어.|응, 그럴게.)
S: {club} 동아리는 {day}에 {place}에서 모이고, $B는 {bring:을} 가져오기로 합니다.
F: club day place bring

= parttime | 아르바이트
% name=NAME; day:+=DAY; time=ETIME; shop=편의점/카페/빵집/서점
A: 사장님, {day0}에 {shop} 근무를 (쉬어도 될까요?|쉬고 싶은데요.)
B: (무슨 일 있어요?|왜요?)
A: {name} 씨 결혼식이 (있어서요.|있습니다.)
+B: 결혼식이 {day0}(이에요? 달력을 다시 봐요.| 맞아요?)
+A: (아, {day}입니다. 잘못 말했어요.|죄송해요, {day0:이} 아니라 {day}입니다.)
B: (그래요.|좋아요.) 대신 다음 날 {time}까지 (일해 줘요.|나와 줘요.)
A: (네, 감사합니다.|네, 그럴게요.)
S: $A는 {name}의 결혼식 때문에 {day} {shop} 근무를 쉬고, 다음 날 {time}까지 일하기로 합니다.
F: name day shop time

= trip | 여행 계획
% city:+=제주/부산/강릉/여수/경주/속초; date=DATE; by=기차/버스/비행기/자동차; place=바닷가/시장/박물관/온천
A: {date}에 (여행 갈까?|여행 가기로 한 거 기억하지?)
B: (좋아, |){city0:으로} (가고 싶어.|가자.)
+A: {city0:은} (작년에 갔잖아.|너무 멀어.) ({city:은} 어때?|{city:이} 좋겠어.)
+B: (거기도 좋지.|그래, 거기로 하자.) 뭐 타고 갈까?
-A: (나도 좋아.|그래, 좋아.)
-B: 뭐 타고 갈까?
A: {by}(가 편할 것 같아.|로 가는 게 싸.)
B: (그래. |)도착하면 {place}부터 (가자.|구경하자.)
S: $A와 $B는 {date}에 {by:으로} {city}에 여행을 가서 {place}부터 가기로 합니다.
F: date by city place

= camping | 캠핑 준비
% day=DAY; food:+=고기/라면/고구마/김치찌개/옥수수; item=텐트/침낭/손전등/의자; name=NAME
A: {day} 캠핑 준비 (다 했어?|어떻게 할까?)
B: (아직. |)먹을 건 {food0:으로} (할까?|하자.)
+A: {food0:은} (질렸어.|싫어.) {food:은} (어때?|먹고 싶어.)
-A: (좋아, 맛있겠다.|그래, 좋아.)
B: (그래, 내가 살게.|응, 내가 준비할게.) {item}도 (필요하지?|있어야 해.)
A: 그건 {name}에게 (빌리자.|빌릴게.)
B: (좋은 생각이야.|다행이다.)
S: $A와 $B는 {day} 캠핑에 {food:을} 준비하고 {item:은} {name}에게 빌리기로 합니다.
F: day food item name

= hiking | 등산 약속
% mt=설악산/북한산/지리산/한라산; day=DAY; time:+=오전 9시/오전 11시/아침 6시/아침 7시/아침 8시; bring=김밥/물/과일/커피
A: {day}에 {mt} (갈래요?|같이 가실래요?)
B: (네, 좋아요.|네, 가고 싶었어요.) 몇 시에 (출발할까요?|만날까요?)
A: {time0} (어때요?|괜찮아요?)
+B: (그때는 길이 막혀요.|그때는 좀 힘들어요.) {time:은} (어때요?|괜찮으세요?)
+A: (네, 그렇게 해요.|네, 좋습니다.) 저는 지도를 챙길게요.
-B: (네, 딱 좋아요.|네, 그때 봐요.)
-A: 저는 지도를 챙길게요.
B: (그럼 |)저는 {bring:을} (가져갈게요.|준비할게요.)
S: $A와 $B는 {day} {time}에 {mt}에 가기로 하고, $B는 {bring:을} 준비하기로 합니다.
F: day time mt bring

= grocery | 장보기
% food=된장찌개/미역국/카레/잡채/갈비찜; need:+=오이/당근/감자/양파/호박; count=한 개/두 개/세 개/네 개; shop=시장/마트/슈퍼
A: (여보, |)저녁에 {food} (해 먹을까요?|어때요?)
B: (좋아요. |){need0:이} (없으니까|다 떨어졌으니까) 사 오세요.
+A: {need0:은} 냉장고에 (있던데요?|많아요.)
+B: (아, 그럼 {need}만 사면 돼요.|아, {need:을} 말하려고 했어요.)
A: (알았어요. |)몇 개 (살까요?|필요해요?)
B: {count} (사 오세요.|있으면 돼요.)
A: (네, |){shop}에 (다녀올게요.|갔다 올게요.)
S: $A는 저녁에 먹을 {food} 재료로 {shop}에서 {need} {count:을} 사 오기로 합니다.
F: food shop need count

= dinner | 외식 메뉴
% who=할머니/할아버지/이모/삼촌; menu:+=삼겹살/냉면/초밥/피자/칼국수/갈비; day=DAY; place=회사 근처/집 근처/역 근처/공원 근처
A: {day}에 {who:이} (오신대.|우리 집에 오셔.)
B: (그럼 |){menu0} 먹으러 (갈까요?|가요.)
+A: {who:은} {menu0:을} (못 드셔.|안 좋아하셔.) {menu:이} (낫겠다.|좋겠어.)
-A: (그래, 좋아하실 거야.|그거 좋겠다.)
B: (네, 그래요.|네, 좋아요.) {place} 식당으로 (예약할게요.|할까요?)
A: (응, 부탁해.|그래, 고마워.)
S: $A와 $B는 {day}에 오시는 {who:과} 함께 {place}에서 {menu:을} 먹기로 합니다.
F: day who place menu

= leave | 휴가 신청
% date=DATE; days:+<=하루/이틀/사흘/나흘/닷새; why=가족 여행/건강 검진/이사/집수리; name=NAME
A: 부장님, {date}부터 {days0} 휴가를 (쓰고 싶습니다.|내도 될까요?)
B: (무슨 일이에요?|이유가 뭔가요?)
A: {why} 때문입니다.
+B: (그때는 바빠서 {days0:은} 어렵고 {days}만 가능해요.|{days}만 쓰면 어때요? {days0:은} 너무 길어요.)
-B: (네, 그렇게 하세요.|알겠어요, 다녀오세요.)
A: (네, 감사합니다.|네, 고맙습니다.) 일은 {name} 씨에게 (맡기겠습니다.|부탁하겠습니다.)
B: (좋아요.|네, 그러세요.)
S: $A는 {why} 때문에 {date}부터 {days} 휴가를 쓰고, 일은 {name}에게 맡기기로 합니다.
F: why date days name

= bustrip | 출장 준비
% city=대전/울산/인천/춘천/세종; by:+=기차/버스/비행기/회사 차; day=WDAY; name=NAME
A: {day}에 {city} 출장이 (있습니다.|잡혔어요.) 누가 갈까요?
B: 저와 {name} 씨가 (가겠습니다.|갈게요.)
A: (좋아요. |){by0:으로} (가시나요?|갈 건가요?)
+B: (네, 그런데 |){by0:은} 빈자리가 (없네요.|없어서요.) {by:으로} (바꾸겠습니다.|가야겠어요.)
-B: (네, 그게 편합니다.|네, 그렇습니다.)
A: (네, 잘 다녀오세요.|네, 조심히 다녀오세요.)
S: $B는 {name:과} 함께 {day}에 {by:으로} {city} 출장을 가기로 합니다.
F: name day by city

= museum | 단체 관람
% place=박물관/미술관/과학관/동물원; people=열 명/스무 명/서른 명/마흔 명; day:+=DAY; price=WON
A: {place} 단체 관람을 (예약하고 싶습니다.|신청하려고요.)
B: (언제|무슨 요일에) 몇 분이 (오시나요?|오실 예정인가요?)
A: {day0}에 {people}(이에요.|이 갑니다.)
+B: {day0:은} (쉬는 날입니다.|문을 닫습니다.) {day}에 (오시겠어요?|오시면 어떨까요?)
+A: (네, 그럼 그날 갈게요.|그날도 좋습니다.) 요금은 얼마예요?
-B: (네, 가능합니다.|네, 예약됐습니다.)
-A: 요금은 얼마예요?
B: (모두 |){price}입니다.
S: $A는 {day}에 {people:이} {place:을} 관람하도록 {price}에 예약합니다.
F: day people place price

= concert | 공연 예매
% show=뮤지컬/연극/음악회/발레; date=DATE; seat:+=앞자리/뒷자리/가운데 자리/이층 자리; price=WON; name=NAME
A: {date} {show} 표를 (사고 싶어요.|예매하고 싶습니다.)
B: 어느 자리를 (원하세요?|드릴까요?)
A: {seat0:으로} (주세요.|부탁해요.)
+B: (지금 {seat}만 남아 있어요. {seat0:은} 매진됐어요.|{seat0:은} 없고 {seat:이} 남았습니다.)
+A: (그거라도 주세요.|그럼 그 자리로 할게요.)
B: 한 장에 {price}입니다. 누구 이름으로 (할까요?|예약할까요?)
A: {name} 이름으로 (해 주세요.|부탁합니다.)
B: (네, 예매됐습니다.|네, 다 됐습니다.)
S: $A는 {date} {show}의 {seat:을} 한 장에 {price:을} 내고 {name} 이름으로 예매합니다.
F: date show seat price name

= noise | 관리사무소
% noise=피아노 소리/발소리/개 짖는 소리/공사 소리; time:+=밤 10시/밤 11시/새벽 1시/새벽 2시; floor=윗집/아랫집/옆집/앞집; act=방송/안내문/전화/문자
A: {floor}에서 나는 {noise} 때문에 (힘들어요.|잠을 못 자요.)
B: (몇 시까지 시끄러운가요?|언제까지 소리가 나나요?)
A: 보통 {time0}까지(요.|예요.)
+C: (아니에요, 어제는 {time}까지 났어요.|저도 들었는데 {time0:이} 아니라 {time}까지였어요.)
B: (죄송합니다. |){act:으로} (알리겠습니다.|주의를 주겠습니다.)
A: (네, 부탁드려요.|네, 고맙습니다.)
S: $A는 {floor}에서 {time}까지 나는 {noise} 때문에 불평하고, $B는 {act:으로} 알리겠다고 합니다.
F: floor time noise act

= directions | 길 안내
% place=시청/경찰서/우체국/병원/미술관; bus:+=3번 버스/5번 버스/7번 버스/9번 버스; stop=두 정거장/세 정거장/네 정거장/다섯 정거장; land=은행/학교/다리/빵집
A: (실례합니다. |){place}에 (어떻게 가나요?|가고 싶은데요.)
B: {bus0:을} (타세요.|타면 됩니다.)
+C: (아니에요, {bus0:은} 거기 안 가요. {bus:을} 타세요.|{bus:을} 타야 해요. {bus0:은} 노선이 바뀌었어요.)
A: (네. |)몇 정거장 (가야 하나요?|가요?)
B: {stop} 가서 (내리세요.|내리면 됩니다.)
A: 내리면 (바로 보이나요?|찾기 쉬운가요?)
B: (네, |){land} 옆에 있어요.
S: $A가 {place:을} 찾자, {bus:을} 타고 {stop} 가서 {land} 옆으로 가면 된다는 안내를 받습니다.
F: place bus stop land

= taxi | 택시
% place:+=공항/기차역/시청/백화점/대학교; time=OTIME; road=고속도로/강변도로/시내 길/터널; why=비행기/회의/시험/약속
A: 기사님, {place0:으로} (가 주세요.|가 주시겠어요?)
B: (네, |)많이 (급하세요?|바쁘신가요?)
A: (네, |){time}에 {why:이} (있어요.|있거든요.)
+B: (네, {place0} 맞으시죠?|{place0:으로} 빨리 모실게요.)
+A: (아, 죄송해요. {place0} 말고 {place:으로} 가 주세요.|잠깐만요, {place:으로} 가야 해요.)
B: (그럼 |){road:으로} (가겠습니다.|갈게요.)
A: (네, 감사합니다.|네, 부탁드려요.)
S: $A는 {time}에 {why:이} 있어 {place:으로} 가 달라고 하고, $B는 {road:으로} 가기로 합니다.
F: time why place road

= photo | 사진관
% kind=증명사진/여권 사진/가족사진/졸업 사진; count:+>=네 장/여섯 장/여덟 장/열 장; day=DAY; price=WON
A: {kind:을} (찍고 싶어요.|찍으러 왔어요.)
B: 몇 장 (필요하세요?|뽑아 드릴까요?)
A: {count0}(이요.| 주세요.)
+B: (네, 그런데 |){count:을} 뽑으셔도 값이 {count0:과} (같아요.|같습니다.)
+A: (그럼 그렇게 해 주세요.|그럼 많은 쪽으로 바꿀게요.)
B: (네, |){price}입니다. (한번 웃어 보세요.|여기 앉으세요.)
A: 언제 (찾을 수 있어요?|오면 되나요?)
B: {day}에 (오세요.|찾으러 오시면 됩니다.)
S: $A는 {kind} {count:을} {price}에 뽑고 {day}에 찾기로 합니다.
F: kind count price day

= driving | 운전 학원
% kind=1종 면허/2종 면허/오토바이 면허; month=일주일/이 주일/한 달/두 달; date:+>=DATE; price=BIGWON
A: {kind:을} (따고 싶어요.|따려고 합니다.) 얼마나 걸리나요?
B: (보통 |){month} 정도 (걸립니다.|걸려요.)
A: (그렇군요. |)학원비는 (얼마예요?|얼마인가요?)
B: {price}입니다. {date0}에 (수업이 시작돼요.|시작할 수 있어요.)
+A: {date0:은} (좀 빨라요.|너무 급해요.) 다른 날은 없나요?
+B: {date}에도 (시작합니다.|새 수업이 있어요.)
A: (좋아요, 그때 시작할게요.|네, 그날 올게요.)
S: $A는 {kind:을} 따기 위해 {price:을} 내고 {date}에 시작하는 {month} 과정을 듣기로 합니다.
F: kind price date month

= volunteer | 봉사 활동
% place:+=양로원/고아원/병원/도서관/동물 보호소; day=DAY; task=청소/빨래/요리/책 읽기; people=PEOPLE
A: {day}에 봉사 활동 (가려고 하는데요.|신청하고 싶어요.)
B: (고맙습니다. |)모두 몇 분이세요?
A: {people}입니다. {place0:으로} (가고 싶어요.|가면 될까요?)
+B: {place0:은} (사람이 많아요.|다 찼어요.) {place}에 (사람이 필요해요.|가 주시겠어요?)
+A: (네, 거기로 갈게요.|네, 괜찮습니다.) 무슨 일을 하나요?
-B: (네, 좋습니다.|네, 가능해요.)
-A: 무슨 일을 하나요?
B: {task:을} (도와주시면 됩니다.|하시면 돼요.)
S: $A를 포함한 {people:은} {day}에 {place}에서 {task:을} 돕기로 합니다.
F: people day place task

= wedding | 결혼식
% name=NAME; date:+=DATE; place=호텔/성당/예식장/교회; gift=WON
A: {name:이} {date0}에 결혼한대. (들었어?|너도 갈 거지?)
+B: (날짜가 바뀌었대. {date}에 한대.|{date0:이} 아니라 {date:이}라고 들었어.)
-B: (응, 들었어.|응, 나도 갈 거야.)
A: (그래? |)장소는 (어디야?|어디래?)
B: {place}(에서 한대.|에서 한다고 했어.)
A: 축의금은 (얼마 할까?|얼마가 좋을까?)
B: {gift}씩 (하자.|내자.)
A: (그래, 그러자.|좋아, 그렇게 하자.)
S: $A와 $B는 {date}에 {place}에서 하는 {name}의 결혼식에 축의금을 {gift}씩 내기로 합니다.
F: date place name gift
"""

JOSA_BY_SOUND = {"은": "는", "이": "가", "을": "를", "과": "와", "이에요": "예요"}


def has_batchim(word: str) -> bool:
    """Whether the last syllable is closed. Placeholders such as #Person1# count as open, as the field writes them."""
    last = ord(word[-1])
    return 0xAC00 <= last <= 0xD7A3 and (last - 0xAC00) % 28 != 0


def with_josa(word: str, josa: str) -> str:
    """Append ``josa``, given in its after-consonant form, in the form the word's last sound asks for."""
    closed = has_batchim(word)
    if josa == "으로":  # ㄹ (jongseong 8) takes 로
        return word + ("으로" if closed and (ord(word[-1]) - 0xAC00) % 28 != 8 else "로")
    if closed:
        return word + josa
    if josa in JOSA_BY_SOUND:
        return word + JOSA_BY_SOUND[josa]
    return word + josa.removeprefix("이")


def parse_slot(text: str) -> tuple[str, dict]:
    """A slot's name, and what may stand in it."""
    key, values = re.fullmatch(r"([\w:+<>]+)=(.*)", text).groups()
    slot, _, change = key.partition(":")
    order = change[-1:] if change[-1:] in "<>" else ""
    words = INVENTORIES.get(values, values).split("/")
    return slot, {"flag": change.rstrip("<>"), "order": order, "words": words}


def parse_scenarios(text: str = SCENARIOS) -> list[dict]:
    """The notation above as plain dictionaries, in order."""
    scenarios = []
    for line in filter(None, map(str.strip, text.splitlines())):
        mark, rest = line.split(" ", 1)
        if mark == "=":
            name, topic = rest.split(" | ")
            scenarios.append({"id": name, "topic": topic, "slots": {}, "turns": []})
        elif mark == "%":
            scenarios[-1]["slots"] |= dict(map(parse_slot, rest.split("; ")))
        elif mark == "S:":
            scenarios[-1]["summary"] = rest
        elif mark == "F:":
            scenarios[-1]["facts"] = rest.split()
        else:
            flag, speaker = re.fullmatch(r"([-+x])?([ABC]):", mark).groups()
            scenarios[-1]["turns"].append((flag or "", speaker, rest))
    return scenarios


def pick(rng: random.Random, items: list):
    # random() is the one method whose sequence Python promises to keep for a seed; choice() has changed before.
    return items[int(rng.random() * len(items))]


def holds(flag: str, flags: set[str]) -> bool:
    return "+" not in flags if flag == "-" else not flag or flag in flags


def draw_words(scenario: dict, flags: set[str], rng: random.Random) -> dict[str, str]:
    """One word per slot; a changed slot also gets its rejected first value under ``<slot>0``."""
    words = {}
    for slot, spec in scenario["slots"].items():
        count = len(spec["words"])
        final = first = int(rng.random() * count)
        if spec["flag"] and spec["flag"] in flags:
            while first == final:
                final, first = int(rng.random() * count), int(rng.random() * count)
            if spec["order"] and (final > first) != (spec["order"] == ">"):
                final, first = first, final
        words[slot] = spec["words"][final]
        words[slot + "0"] = spec["words"][first]
    return words


def fill(text: str, words: dict[str, str], speakers: dict[str, str], rng: random.Random) -> str:
    text = re.sub(r"\(([^()]*)\)", lambda m: pick(rng, m[1].split("|")), text)
    text = re.sub(r"\$([ABC])", lambda m: speakers[m[1]], text)
    text = re.sub(r"\{(\w+)(?::(\w+))?\}", lambda m: with_josa(words[m[1]], m[2]) if m[2] else words[m[1]], text)
    return re.sub(r" +", " ", text).strip()


def make_row(scenario: dict, rng: random.Random) -> dict:
    """One dialogue with its summary; raises if the scenario breaks what the data set promises."""
    flags = {flag for flag, rate in FLAG_RATE.items() if rng.random() < rate}
    words = draw_words(scenario, flags, rng)
    speakers: dict[str, str] = {}
    turns, previous = [], ""
    for flag, speaker, text in scenario["turns"]:
        if not holds(flag, flags):
            continue
        assert speaker != previous, f"{scenario['id']}: {speaker} speaks twice in a row"
        previous = speaker
        speakers.setdefault(speaker, f"#Person{len(speakers) + 1}#")
        turns.append(f"{speakers[speaker]}: {fill(text, words, speakers, rng)}")
    summary = fill(scenario["summary"], words, speakers, rng)
    facts = [words.get(slot, slot) for slot in scenario["facts"]]
    dialogue = "\n".join(turns)
    assert 5 <= len(turns) <= 9, f"{scenario['id']}: {len(turns)} turns"
    assert all(fact in summary and fact in dialogue for fact in facts), f"{scenario['id']}: {facts} / {summary}"
    assert not any(all(fact in turn for fact in facts) for turn in turns), f"{scenario['id']}: one turn tells it all"
    return {"dialogue": dialogue, "summary": summary, "topic": scenario["topic"], "facts": "|".join(facts)}


def make_splits(seed: int = SEED) -> dict[str, list[dict]]:
    """Every split, scenarios in equal shares. No dialogue, and no scenario with the same facts, is in two splits."""
    rng = random.Random(seed)
    scenarios = parse_scenarios()
    dialogues: set[str] = set()
    owner_of_facts: dict[tuple[str, str], str] = {}
    splits = {}
    for split in ("test", "dev", "train"):  # small splits first: they then choose freely
        rows = []
        while len(rows) < SPLITS[split]:
            scenario = scenarios[len(rows) % len(scenarios)]
            row = make_row(scenario, rng)
            owner = owner_of_facts.get((scenario["id"], row["facts"]), split)
            if row["dialogue"] in dialogues or owner != split:
                continue
            dialogues.add(row["dialogue"])
            owner_of_facts[scenario["id"], row["facts"]] = split
            rows.append(row)
        order = sorted(range(len(rows)), key=[rng.random() for _ in rows].__getitem__)
        splits[split] = [{"fname": f"{split}_{i}", **rows[j]} for i, j in enumerate(order)]
    return splits


def to_csv(rows: list[dict]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the quickstart data set (train.csv, dev.csv, test.csv).")
    parser.add_argument("--output", type=Path, default=ROOT / "recipes" / "quickstart")
    output = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in make_splits().items():
        write_text_atomically(output / f"{split}.csv", to_csv(rows))
        print(f"{output / split}.csv: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
